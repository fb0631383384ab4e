"""Compute CIDEr-D of captions (Vedantam et al. 2015) over the tokens of the COCO caption evaluation (Chen et al. 2015).

    CIDEr-D = 10 · mean over references and n = 1..4 of  e^(-(l_c - l_r)² / 2σ²) · Σ min(c, r) · r / (|c| |r|)

c, r: count of each n-gram in caption and reference, times log(images / images whose references contain it); l: words;
σ = 6. The images are the evaluated ones, so a score depends on the set, and a single image scores 0.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from mm1.errors import UserError

N, SIGMA = 4, 6.0

Gram = tuple[str, ...]

# Abbreviations that keep their period in any case, and others that keep it only when capitalized.
ABBREVIATIONS = (
    "st mr mrs ms dr co inc corp ltd jr sr ave blvd rd mt etc vs est rev gen prof jan feb mar apr jun jul aug sep "
    "sept oct nov dec mon tue tues wed thu thurs fri ft al ala ariz calif colo conn ct dak dept fla ga ind kan kans "
    "ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo sq adm atty attys col cmdr capt lt sgt maj "
    "cpl pvt sen sens rep reps gov govs hon messrs mme mlle pres supt ph bros assn univ intl cie plc bhd bldg esq "
    "cf tel ext ste natl mfg brig insp rt wm jos alex ph.d"
)
CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
LETTER = r"[^\W\d_]"
TOKEN = re.compile(
    rf"""
    https?://\S+ | www\.[\w.-]*\w | [\w.+-]*@[\w.-]*\w | \#{LETTER}\w*
  | (?:{LETTER}\.)+(?!{LETTER})                                             # U.S.
  | (?:(?i:{"|".join(map(re.escape, ABBREVIATIONS.split()))})|{CAPITALIZED.replace(" ", "|")})\.(?!{LETTER})
  | (?i:nos?|figs?|pp|op|prop)\.(?=\ ?\d)                                   # no. 5
  | [A-Z]+&[A-Z]+
  | '[Nn]' | (?i:n't|'(?:s|m|re|ve|d|ll|em|til|cause|n))(?!\w)
  | '\d\ds?\b | '[Tt](?=is\b|was\b)
  | (?:(?<!\w)[-+])?[.:]?\d+(?:[.,:/]\d+)+ | (?<!\S)[-+]\d+\b | [.:]\d+
  | (?i:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b))
  | (?i:(?:[odlcj]|ma|ne|qu)'{LETTER}{{2,}} | y'(?=all\b) | {LETTER}+(?=n't(?!\w)))
  | [^\W_]+(?:(?:[-/!?_]|(?<={LETTER})\.(?={LETTER}))[^\W_]+)*
  | _+ | [!?]+ | \.\.+ | -+ | \S
    """,
    re.VERBOSE,
)
WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
           "£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4"}  # fmt: skip
DROPPED = re.compile(r"['`\",:;?!…–—“”]|\.+|-+")


def tokenize(text: str) -> list[str]:
    """Split a text like Stanford's PTBTokenizer 3.4.1 with -lowerCase and without punctuation, as coco-caption does.

    The result is the same for all 24,019 captions of 4,800 images of COCO's validation set, but not for smileys and
    markup. Brackets are kept, "(" as -lrb-: coco-caption drops only upper-case names, and that after lower-casing.
    """
    tokens = TOKEN.findall(text.replace("’", "'").replace("‘", "'"))
    return [WRITTEN.get(token) or token.lower() for token in tokens if not DROPPED.fullmatch(token)]


def cider(
    captions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
) -> tuple[float, dict[Hashable, float]]:
    """Return the mean and each caption's CIDEr-D, from 0 to 10 (papers report 100 times that). Keys are images.

    Raises UserError if a caption has no references.
    """
    without = [key for key in captions if not references.get(key)]
    if without:
        other = f", ids such as {next(iter(references))!r}" if references else ""
        count = f"{len(captions) - len(without)} of {len(captions)} captions"
        raise UserError(f"{count} match the references of {len(references)} images{other}: none of {without[0]!r}")
    grams_of = {key: [_grams(text) for text in references[key]] for key in captions}
    documents = Counter(gram for counts in grams_of.values() for gram in set().union(*counts))
    log_images = math.log(max(len(grams_of), 1))
    weight = {gram: log_images - math.log(count) for gram, count in documents.items()}
    scores: dict[Hashable, float] = {}
    for key, text in captions.items():
        caption = _Vector(_grams(text), weight, log_images)
        pairs = [_similarity(caption, _Vector(grams, weight, log_images)) for grams in grams_of[key]]
        scores[key] = 10 * sum(pairs) / len(pairs)
    return sum(scores.values()) / max(len(scores), 1), scores


def _grams(text: str) -> Counter[Gram]:
    words = tokenize(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


class _Vector:
    """Hold the weighted n-grams of a text, their norm for each n, and the number of words."""

    def __init__(self, grams: Counter[Gram], weight: Mapping[Gram, float], unseen: float):
        self.values = {gram: count * weight.get(gram, unseen) for gram, count in grams.items()}
        squares = [0.0] * N
        for gram, value in self.values.items():
            squares[len(gram) - 1] += value * value
        self.norms = [math.sqrt(square) for square in squares]
        self.words = sum(count for gram, count in grams.items() if len(gram) == 1)


def _similarity(caption: _Vector, reference: _Vector) -> float:
    products = [0.0] * N
    for gram, value in caption.values.items():
        other = reference.values.get(gram, 0.0)
        products[len(gram) - 1] += min(value, other) * other
    norms = [a * b for a, b in zip(caption.norms, reference.norms)]
    distance = caption.words - reference.words
    shared = sum(product / norm for product, norm in zip(products, norms) if norm)
    return math.exp(-(distance**2) / (2 * SIGMA**2)) * shared / N
