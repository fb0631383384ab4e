"""Accuracy of answers (Antol et al. 2015, VQA): agreement with ten people, as the official evaluation counts it.

accuracy = mean over people of  min(1, those of the others who said the same / 3)
"""

import re
from collections.abc import Sequence

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
# Written without one of their apostrophes they get it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it


def normalize(answer: str) -> str:
    """Return an answer in lower case, without punctuation and articles, with digits for numbers and all apostrophes.

    A mark that touches a space anywhere, or any mark where a comma is between digits, goes; else it becomes a space.
    """
    text = _cleaned(answer)
    joined = bool(_DIGIT_COMMA.search(text))
    kept = text
    for mark in _PUNCTUATION:
        touches = joined or f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if touches else " ")
    kept = _PERIOD.sub("", kept, count=32)  # the official call gives a flag, of value 32, where the count belongs
    words = [_NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return 0 to 1. Where all answers are the same, neither they nor the prediction are normalised."""
    prediction, answers = _cleaned(prediction), [_cleaned(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    same = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (same - (answer == prediction)) / 3) for answer in answers) / len(answers)


def _cleaned(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
