"""Compute the accuracy of answers by agreement with ten people as in the official evaluation (Antol et al. 2015, VQA).

accuracy = mean over people of  min(1, number of the other people who gave this answer / 3)
"""

import re
from collections.abc import Sequence

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
# A contraction that lacks one of its apostrophes is repaired.
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
    """Return an answer in lower case without punctuation and articles, with digits for number words and apostrophes.

    A punctuation mark is removed if it is next to a space anywhere in the text, or if the text has a comma between
    digits; otherwise it becomes a space.
    """
    text = result = _cleaned(answer)
    for mark in _PUNCTUATION:
        removed = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        result = result.replace(mark, "" if removed else " ")
    result = _PERIOD.sub("", result, count=32)  # the official call passes a flag, whose value is 32, as the count
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return an answer's accuracy, 0 to 1. If all people gave the same answer, nothing is normalized."""
    prediction, answers = _cleaned(prediction), [_cleaned(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    same = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (same - (answer == prediction)) / 3) for answer in answers) / len(answers)


def _cleaned(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
