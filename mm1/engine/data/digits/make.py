"""Write the demo's data next to this file, from the 1,797 handwritten digits that scikit-learn ships.

    python -m mm1.engine.data.digits.make [folder]

An image is a grid of 1 to 6 digits of 8 x 8 pixels each, read like a page. Glyphs are split into train and test before
any image is drawn, so that no test image has a glyph of training. The same libraries write the same bytes in each run;
another zlib may compress the same content to other bytes.
"""

import gzip
import io
import json
import random
import struct
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mm1.engine.data.digits import notations
from mm1.engine.data.digits.notations import WORDS, interleaved
from mm1.engine.data.tokenizer import byte_level_bpe

SEED = 1998  # the year the digits were given to the UCI repository
PLURALS = tuple("sixes" if word == "six" else word + "s" for word in WORDS)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

CELL = 8  # pixels of a digit: two patches of 4
LAYOUTS = {  # digits -> (rows, columns)
    1: [(1, 1)], 2: [(1, 2)], 3: [(1, 3)], 4: [(1, 4), (2, 2)], 5: [(1, 5)], 6: [(1, 6), (2, 3)],
}  # fmt: skip
TRAIN_IMAGES = {1: 3600, 2: 3600, 3: 3000, 4: 2600, 5: 1400, 6: 1200}
TEST_IMAGES = {2: 200, 3: 200, 4: 200, 5: 200, 6: 200}  # and each test glyph once, alone
DOCUMENTS, ITEMS, STATEMENTS, NOTATION_ITEMS = 3000, 400, 600, 300
TURNS = (12, 17, 19, 17, 12, 9, 7, 4, 3)  # weights of 1 to 9 turns in a document: mean 4
LISTS = 0.4  # share of documents that caption instead of asking

KINDS = ("count", "largest", "smallest", "where", "first", "last")
COUNTS: dict[str, int] = dict(zip(WORDS, (2, 3, 3, 2, 2, 1, 1)))  # weights of the answers to "count"


def split(labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Return the glyph indices for train and for test. A fifth of each class goes to test."""
    classes = [[i for i, label in enumerate(labels) if label == digit] for digit in range(10)]
    test = {i for glyphs in classes for i in rng.sample(glyphs, round(len(glyphs) / 5))}
    return sorted(set(range(len(labels))) - test), sorted(test)


def deal(glyphs: list[int], labels: list[int], counts: dict[int, int], rng: random.Random) -> list[list[int]]:
    """Return the glyph indices of each image. counts: the number of images by their number of digits.

    The glyphs of a class are drawn like cards of a deck that is shuffled again when empty, so all occur equally often.
    """
    decks: dict[int, list[int]] = defaultdict(list)

    def draw(digit: int) -> int:
        if not decks[digit]:
            decks[digit] = [i for i in glyphs if labels[i] == digit]
            rng.shuffle(decks[digit])
        return decks[digit].pop()

    sizes = [size for size, count in counts.items() for _ in range(count)]
    rng.shuffle(sizes)
    images = []
    for size in sizes:
        # Free draws seldom repeat a digit; half of the images use few, so that there is something to count.
        pool = range(10) if rng.random() < 0.5 else rng.sample(range(10), rng.randint(1, min(3, size)))
        images.append([draw(rng.choice(pool)) for _ in range(size)])
    return images


def render(glyphs: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return an image uint8 [H, W] of 0 to 15 that shows glyphs [n, 8, 8] of 0 to 16.

    Digits are light on dark; layout, brightness and contrast are drawn at random.
    """
    rows, columns = rng.choice(LAYOUTS[len(glyphs)])
    ink = glyphs.reshape(rows, columns, CELL, CELL).swapaxes(1, 2).reshape(rows * CELL, columns * CELL)
    dark, light = rng.randint(0, 3), rng.randint(11, 15)
    return ((dark * 16 + (light - dark) * ink.astype(np.int32) + 8) // 16).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """Return an image uint8 [H, W] of 0 to 15 as PNG in 4-bit grey, a third smaller than with 8 bits.

    Pillow reads this form, but cannot write it.
    """

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = image.shape
    packed = image[:, 0::2] << 4 | image[:, 1::2]  # two pixels per byte; the width is even
    lines = b"".join(b"\0" + line.tobytes() for line in packed)  # filter type 0 (none), the best one below 8 bits
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def caption(digits: Iterable[int]) -> str:
    """Return the digits as words."""
    return " ".join(WORDS[digit] for digit in digits)


def questions(digits: list[int]) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, question, answer) for every question about an image of these digits."""
    for digit in range(10):
        yield "count", f"how many {PLURALS[digit]}?", WORDS[digits.count(digit)]
    yield "first", "what is first?", WORDS[digits[0]]
    yield "last", "what is last?", WORDS[digits[-1]]
    if len(digits) == 1:  # the rest would have one possible answer
        return
    yield "largest", "which is largest?", WORDS[max(digits)]
    yield "smallest", "which is smallest?", WORDS[min(digits)]
    for digit in digits:
        if digits.count(digit) == 1:
            yield "where", f"where is the {WORDS[digit]}?", ORDINALS[digits.index(digit)]


class Quiz:
    """Draw questions about images. The answer is drawn first, so that no answer is a good guess."""

    def __init__(self, images: list[list[int]], rng: random.Random):
        self.rng = rng
        self.pairs: dict[str, dict[str, list[tuple[int, str]]]] = {kind: defaultdict(list) for kind in KINDS}
        for image, digits in enumerate(images):
            for kind, question, answer in questions(digits):
                self.pairs[kind][answer].append((image, question))

    def draw(self, kind: str) -> tuple[int, str, str]:
        """Return the index of an image, a question of this kind about it, and the answer."""
        answers = sorted(self.pairs[kind])
        weights = [COUNTS[answer] for answer in answers] if kind == "count" else None
        answer = self.rng.choices(answers, weights)[0]
        return *self.rng.choice(self.pairs[kind][answer]), answer

    def items(self, shard: str, count: int) -> list[dict]:
        """Return `count` questions about images of a shard, the kinds in turn."""
        drawn = [self.draw(KINDS[i % len(KINDS)]) for i in range(count)]
        return [{"image": member(shard, i), "question": question, "answer": a} for i, question, a in drawn]


def member(shard: str, image: int) -> str:
    """Return the name of an image as documents refer to it: shard and member."""
    return f"{shard}/{image:06d}.png"


def document(shard: str, images: list[list[int]], quiz: Quiz, rng: random.Random) -> dict:
    """Return an interleaved document in the form of OBELICS: at each position either a text or an image."""
    turns = rng.choices(range(1, 10), TURNS)[0]
    if rng.random() < LISTS:
        shown = rng.sample(range(len(images)), turns)
        return interleaved("list\n", {member(shard, image): caption(images[image]) + "\n" for image in shown})
    texts: dict[str, str] = {}  # no image occurs twice
    kinds = [rng.choice(KINDS)] if rng.random() < 0.5 else KINDS
    while len(texts) < turns:
        image, question, answer = quiz.draw(rng.choice(kinds))
        texts.setdefault(member(shard, image), f"question: {question} answer: {answer}\n")
    return interleaved("quiz\n", texts)


def statements(rng: random.Random) -> list[str]:
    """Return true sentences in the vocabulary of the quiz: every short one, then random ones about lists of digits."""
    pairs = [(a, b) for a in range(10) for b in range(a)]
    sentences = [f"after {WORDS[a]} comes {WORDS[a + 1]}." for a in range(9)]
    sentences += [f"before {WORDS[a + 1]} comes {WORDS[a]}." for a in range(9)]
    sentences += [f"between {WORDS[a]} and {WORDS[a + 2]} is {WORDS[a + 1]}." for a in range(8)]
    sentences += [f"{WORDS[a]} is larger than {WORDS[b]}." for a, b in pairs]
    sentences += [f"{WORDS[b]} is smaller than {WORDS[a]}." for a, b in pairs]
    sentences += [f"{WORDS[a]} and {WORDS[b]} make {WORDS[a + b]}." for a in range(10) for b in range(10 - a)]
    while len(sentences) < STATEMENTS:
        digits = [rng.randrange(10) for _ in range(rng.randint(2, 5))]
        often, times = Counter(digits).most_common(1)[0]
        ends = {"largest": WORDS[max(digits)], "smallest": WORDS[min(digits)]}
        ends |= {"first": WORDS[digits[0]], "last": WORDS[digits[-1]]}
        claims = [f"the {name} is {word}." for name, word in ends.items()]
        end = rng.choice([*claims, f"how many {PLURALS[often]}? {WORDS[times]}."])
        if (line := f"{caption(digits)}: {end}") not in sentences:
            sentences.append(line)
    rng.shuffle(sentences)
    return sentences


def write_gzip(path: Path, data: bytes) -> None:
    """Write a gzip file without name and time in its header. gzip.compress's header depends on the platform."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(data)


def write_shard(path: Path, samples: Iterable[tuple[bytes, str]]) -> None:
    """Write a WebDataset shard of images and their captions: 000000.png, 000000.txt, 000001.png, ..."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, (image, text) in enumerate(samples):
            for extension, body in (("png", image), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{key:06d}.{extension}")  # a new TarInfo has time, owner and group 0
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    write_gzip(path, buffer.getvalue())


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as gzipped lines of JSON."""
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    write_gzip(path, lines.encode())


def make(folder: Path) -> None:
    """Write all data files into `folder`."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    labels = targets.tolist()
    rng = random.Random(SEED)
    train, test = split(labels, rng)
    used = {
        "train-captions.tar.gz": deal(train, labels, TRAIN_IMAGES, rng),
        "test-captions.tar.gz": [[glyph] for glyph in test] + deal(test, labels, TEST_IMAGES, rng),
    }
    digits = {shard: [[labels[i] for i in image] for image in images] for shard, images in used.items()}
    ink = pixels.reshape(-1, CELL, CELL)
    for shard, images in used.items():
        drawn = [png(render(ink[image], rng)) for image in images]
        write_shard(folder / shard, zip(drawn, map(caption, digits[shard])))
    (folder / "split.json").write_text(json.dumps({"test": test}) + "\n")
    write_gzip(folder / "glyphs.json.gz", json.dumps(used, separators=(",", ":")).encode())

    shard = "train-captions.tar.gz"
    quiz = Quiz(digits[shard], rng)
    documents = [document(shard, digits[shard], quiz, rng) for _ in range(DOCUMENTS)]
    lines = statements(rng)
    write_lines(folder / "train-interleaved.jsonl.gz", documents)
    write_lines(folder / "train-questions.jsonl.gz", quiz.items(shard, ITEMS))
    shard = "test-captions.tar.gz"
    write_lines(folder / "test-interleaved.jsonl.gz", Quiz(digits[shard], rng).items(shard, ITEMS))
    (folder / "text.txt").write_text("".join(line + "\n" for line in lines))

    texts = [caption(image) for image in digits["train-captions.tar.gz"]]
    texts += [text for record in documents for text in record["texts"] if text] + lines
    (folder / "tokenizer.json").write_text(byte_level_bpe(texts, 384).to_str(pretty=True) + "\n")

    rng = random.Random(SEED)  # the other files do not depend on this generator
    train_images, test_images = (
        {member(shard, i): image for i, image in enumerate(images)} for shard, images in digits.items()
    )
    write_lines(folder / "train-notations.jsonl.gz", notations.documents(train_images, DOCUMENTS, rng))
    write_lines(folder / "test-notations.jsonl.gz", notations.items(test_images, NOTATION_ITEMS, rng))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
