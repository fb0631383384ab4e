"""Golden values are the official program's: data/answers.json says whose answers, and by which version."""

import json
from pathlib import Path

import pytest

from mm1.engine.evaluation.vqa import accuracy, normalize

GOLDEN = json.loads((Path(__file__).parent / "data" / "answers.json").read_text())


@pytest.mark.parametrize("item", GOLDEN["questions"], ids=lambda item: repr(item["prediction"])[:30])
def test_accuracy_is_the_official_programs(item):
    assert 100 * accuracy(item["prediction"], item["answers"]) == pytest.approx(item["accuracy"], abs=1e-9)


def test_their_mean_is_the_official_overall_accuracy():
    found = [accuracy(item["prediction"], item["answers"]) for item in GOLDEN["questions"]]
    assert 100 * sum(found) / len(found) == pytest.approx(GOLDEN["overall"], abs=1e-9)


def test_agreement_with_three_others_is_enough():
    """Of ten subsets of nine: those who said it find one fewer."""
    assert [round(accuracy("red", ["red"] * n + ["blue"] * (10 - n)), 4) for n in range(5)] == [0, 0.3, 0.6, 0.9, 1]


def test_what_is_normalised():
    for text, truth in {
        "The  Man": "man", "two": "2", "none": "0", "ten cats": "10 cats", "didnt": "didn't",
        "couldnt've": "couldn't've", "black-white": "black white",
        "red, blue": "red blue", "red,blue": "red blue", "1,000": "1000", "1,000-a": "1000a",
        "black - white": "black white", "a/b": "b", "3.5": "3.5", "yes.": "yes", "p.m.": "pm", "what ?": "what",
        "on\nit": "on it", "Im": "im", "somebody'd": "somebodyd", "": "", "a.b." * 40: "ab" * 16 + "a.b." * 24,
    }.items():  # fmt: skip
        assert normalize(text) == truth, text


def test_equal_answers_are_compared_as_they_are():
    assert accuracy("Yes", ["yes"] * 10) == 0
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert accuracy(" yes\n", ["yes"] * 10) == 1
