"""An answer is scored as the tokens that it has behind its prompt, whoever asks."""

import numpy as np
import pytest
import torch
from small import PATCH, SLOTS, logits_of, small_mm1
from test_generate import picture
from vocabularies import KINDS, byte_fallback, byte_level

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.evaluation.benchmarks import benchmark
from mm1.engine.evaluation.config import ShotSettings
from mm1.engine.evaluation.prompts import Prompts
from mm1.engine.evaluation.samples import Sample
from mm1.engine.infer.generate import generate, score
from mm1.engine.infer.prompts import continued, encode_prompts
from mm1.errors import UserError


@pytest.fixture
def models(tmp_path):
    """Models whose tokenizers begin each text with a space, or not."""
    found = {}
    for make in (byte_fallback, byte_level):
        model = small_mm1(seed=1).eval()
        model.tokenizer = make(tmp_path)
        found[make] = model
    return found


PROMPTS = {
    "one text": (["ab a:"], ["ab a:"]),
    "adjacent texts": (["ab ", "a:"], ["ab a:"]),
    "an empty last text": (["ab a:", ""], ["ab a:"]),
    "an image between": (["b", picture(), "a:"], None),
    "an image last": (["ab", picture()], None),
    "an image last and an empty text": (["ab", picture(), ""], None),
    "an empty text": ([""], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
@pytest.mark.parametrize("prompt, whole", PROMPTS.values(), ids=PROMPTS)
def test_prompt_and_answer_are_one_text(make, prompt, whole, models):
    """The sum over all tokens from the first on that an answer changes; the truth is a full pass of the model."""
    model, answers = models[make], [" ab", " b", "ba a", "\nb"]
    parts = whole or [part for part in prompt if part != ""]
    [before] = encode_prompts(model, [parts])
    documents = []
    for answer in answers:
        text = parts and isinstance(parts[-1], str)
        documents += encode_prompts(model, [[*parts[:-1], parts[-1] + answer] if text else [*parts, answer]])
    kept = min(len(before.tokens), *(int(np.cumprod(same(before, d)).sum()) for d in documents))
    assert kept > 0
    for document, value in zip(documents, score(model, [prompt], [answers])[0], strict=True):
        batch = pack(
            [document], exact_budget([document], PATCH), image_id=model.tokenizer.image, patch=PATCH, slots=SLOTS
        )
        with torch.inference_mode():
            logits = logits_of(model, batch).log_softmax(-1)[kept - 1 : len(document.tokens) - 1]
        tokens = torch.from_numpy(document.tokens[kept:]).long()
        assert value == pytest.approx(float(logits.gather(1, tokens[:, None]).sum()), abs=1e-3)


def same(a, b):
    """Which tokens that both have are equal."""
    size = min(len(a.tokens), len(b.tokens))
    return a.tokens[:size] == b.tokens[:size]


@pytest.mark.parametrize("make", KINDS)
def test_an_empty_text_has_no_tokens(make, tmp_path):
    assert make(tmp_path).encode("") == []


def test_adjacent_texts_of_a_prompt_are_one(models):
    model = models[byte_fallback]
    one, two = encode_prompts(model, [["ab a", picture(), "b b"], ["ab", " a", picture(), "", "b ", "b"]])
    assert np.array_equal(one.tokens, two.tokens)
    assert generate(model, [["ab", " a"]], max_tokens=3) == generate(model, [["ab a"]], max_tokens=3)


def test_shots_without_images_and_the_query_are_one_text(models, tmp_path):
    """Of an evaluation's prompt every text between two images is encoded whole, with each option behind the last."""
    model = models[byte_fallback]
    samples = [Sample(i, None, f"ab {i}?", ("A",), ("a b", "ab")) for i in range(4)]
    for name in ("mmmu", "seed", "scienceqa"):
        of = benchmark(name)
        prompts = Prompts(model, of, samples, ShotSettings("fixed"), tmp_path / "features")
        prompts.check(2, samples)
        asked = prompts.ask(2, samples[0])
        by_key = {sample.key: sample for sample in samples}
        shown = "".join("".join(map(str, of.shot(by_key[key], []).shown)) for key in asked.shots)
        text = shown + "".join(map(str, of.query(samples[0], [])))
        for option, ids in zip(of.continuations(samples[0]), asked.continuations, strict=True):
            whole = [model.tokenizer.bos, *model.tokenizer.encode(text + option)]
            assert [*asked.document.tokens, *ids] == whole


def test_an_empty_answer_is_refused_even_beside_one_that_changes_the_prompts_end(models):
    with pytest.raises(UserError, match="an answer to score is empty"):
        score(models[byte_fallback], [["a"]], [["b", ""]])


class Pairs:
    """A tokenizer whose tokens are pairs of letters."""

    def encode(self, text):
        return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]


def test_tokens_of_the_prompt_that_an_answer_changes_go_with_every_answer():
    pairs = Pairs()
    prompt = Document(np.array([1, *pairs.encode("abc")], np.int32), (), "")
    kept, answers = continued(pairs, prompt, "abc", ["d", "ef"])
    assert (kept.tokens.tolist(), answers) == ([1, *pairs.encode("ab")], [pairs.encode("cd"), pairs.encode("cef")])
    kept, answers = continued(pairs, prompt, "abc", ["", "d"])
    assert (kept.tokens.tolist(), answers) == ([1, *pairs.encode("ab")], [pairs.encode("c"), pairs.encode("cd")])
    kept, answers = continued(pairs, prompt, "", ["de"])
    assert (kept.tokens.tolist(), answers) == (prompt.tokens.tolist(), [pairs.encode("de")])
