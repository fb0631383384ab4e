"""Show that the demo's data is small, true, split without leaks, and reproduced exactly by its script."""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import mm1
from mm1.engine.demo.digits import notation_prompt

FOLDER = Path(mm1.__file__).parent / "engine/data/digits"
SHARDS = ("train-captions.tar.gz", "test-captions.tar.gz")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACES = ["first", "second", "third", "fourth", "fifth", "sixth"]
WRITINGS = {"words": NUMBERS, "numerals": "0123456789", "letters": "abcdefghij"}
SYMBOLS = {symbol: (writing, i) for writing, symbols in WRITINGS.items() for i, symbol in enumerate(symbols)}
PACKED = 3714355114  # checksum of a long list as the zlib that packed the files packs it


@cache
def shard(name: str, folder: Path = FOLDER) -> dict[str, bytes]:
    with tarfile.open(folder / name) as tar:
        return {member.name: body.read() for member in tar if (body := tar.extractfile(member))}


@cache
def records(name: str, folder: Path = FOLDER) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress((folder / name).read_bytes()).splitlines()]


def glyphs() -> dict[str, list[list[int]]]:
    return json.loads(gzip.decompress((FOLDER / "glyphs.json.gz").read_bytes()))


def caption(reference: str) -> str:
    """Return the caption of an image named like train-captions.tar.gz/000123.png; KeyError if it does not exist."""
    name, member = reference.split("/")
    assert shard(name)[member]
    return shard(name)[member.replace(".png", ".txt")].decode()


def answer(question: str, seen: str) -> str:
    """Return the true answer about the digits of the caption `seen`, worked out from the question's text."""
    digits = [NUMBERS.index(word) for word in seen.split()]
    if match := re.fullmatch(r"how many (\w+)\?", question):
        singular = {"sixes": "six"}.get(match[1], match[1].removesuffix("s"))
        return NUMBERS[digits.count(NUMBERS.index(singular))]
    if match := re.fullmatch(r"where is the (\w+)\?", question):
        (place,) = [i for i, digit in enumerate(digits) if digit == NUMBERS.index(match[1])]
        return PLACES[place]
    pick = {"which is largest?": max, "which is smallest?": min}
    pick |= {"what is first?": lambda d: d[0], "what is last?": lambda d: d[-1]}
    return NUMBERS[pick[question](digits)]


def notation(written: str, seen: str) -> tuple[str, str, str]:
    """Return the writing, separator and ending of a text; fail unless it says the digits of the caption `seen`."""
    body, ending = groups(r"(.*?)([.!;]?)", written)
    (separator,) = set(re.findall(r"[^a-z0-9]", body))
    symbols = body.split(separator)
    (writing,) = {SYMBOLS[symbol][0] for symbol in symbols}
    assert [SYMBOLS[symbol][1] for symbol in symbols] == [NUMBERS.index(digit) for digit in seen.split()]
    return writing, separator, ending


def groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    assert match, text
    return match.groups()


def kind(question: str) -> str:
    return question.split()[-1] if question.startswith(("which", "what")) else question.split()[0]


def test_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 3e6


def test_no_test_glyph_is_in_training():
    train, test = ({i for image in glyphs()[name] for i in image} for name in SHARDS)
    assert test == set(json.loads((FOLDER / "split.json").read_text())["test"])
    assert len(test) == 359
    assert not train & test
    assert train | test == set(range(1797))
    for name in ("train-interleaved.jsonl.gz", "train-questions.jsonl.gz", "train-notations.jsonl.gz"):
        assert "test-captions" not in json.dumps(records(name))


def test_training_glyphs_come_equally_often():
    times = Counter(i for image in glyphs()["train-captions.tar.gz"] for i in image)
    assert min(times.values()) > 0.7 * max(times.values())


@pytest.mark.parametrize("name", SHARDS)
def test_captions_name_the_glyphs(name):
    labels = pytest.importorskip("sklearn.datasets").load_digits().target
    captions = [" ".join(NUMBERS[labels[i]] for i in image) for image in glyphs()[name]]
    assert captions == [body.decode() for key, body in shard(name).items() if key.endswith(".txt")]


@pytest.mark.parametrize("name", SHARDS)
def test_shards_pair_images_of_whole_cells_with_captions(name):
    members = list(shard(name).items())
    for i, ((key, image), (text_key, text)) in enumerate(zip(members[::2], members[1::2])):
        assert (key, text_key) == (f"{i:06d}.png", f"{i:06d}.txt")
        if i % 10 == 0:  # decoding all would take seconds
            picture = Image.open(io.BytesIO(image))
            assert picture.mode == "L"
            assert picture.width % 8 == picture.height % 8 == 0
            assert picture.width * picture.height == 64 * len(text.split())
            assert np.ptp(np.asarray(picture)) > 60


def test_the_test_shard_shows_each_test_glyph_alone_once():
    images = glyphs()["test-captions.tar.gz"]
    alone = [image[0] for image in images if len(image) == 1]
    assert len(set(alone)) == len(alone) == 359
    assert Counter(map(len, images)) == {1: 359, 2: 200, 3: 200, 4: 200, 5: 200, 6: 200}


def test_documents_are_true():
    kinds = Counter()
    for record in records("train-interleaved.jsonl.gz"):
        texts, images = record["texts"], record["images"]
        assert all((text is None) != (image is None) for text, image in zip(texts, images, strict=True))
        assert len(texts) in range(3, 20, 2)  # a title and 1 to 9 turns
        assert len(set(images)) == len(texts) // 2 + 1  # no image twice; None
        for image, text in zip(images[1::2], texts[2::2]):
            if texts[0] == "list\n":
                assert text == caption(image) + "\n"
            else:
                assert texts[0] == "quiz\n"
                question, said = groups(r"question: (.*\?) answer: (.*)\n", text)
                assert said == answer(question, caption(image))
                kinds[kind(question)] += 1
    assert len(kinds) == 6
    assert min(kinds.values()) > 0.8 * max(kinds.values())


@pytest.mark.parametrize("name, part", [("train-questions", "train"), ("test-interleaved", "test")])
def test_questions_are_true_and_hard_to_guess(name, part):
    answers = defaultdict(Counter)
    for record in records(f"{name}.jsonl.gz"):
        assert record["image"].startswith(f"{part}-captions.tar.gz/")
        assert record["answer"] == answer(record["question"], caption(record["image"]))
        answers[kind(record["question"])][record["answer"]] += 1
    assert {counter.total() for counter in answers.values()} == {66, 67}
    assert sum(max(counter.values()) for counter in answers.values()) < 0.25 * 400


def test_a_document_keeps_to_one_notation():
    trained = Counter()
    for record in records("train-notations.jsonl.gz"):
        texts, images = record["texts"], record["images"]
        assert all((text is None) != (image is None) for text, image in zip(texts, images, strict=True))
        assert texts[0] == "write\n"
        shown, written = images[1::2], [text.removesuffix("\n") for text in texts[2::2]]
        assert len(set(shown)) == len(shown) == len(written)
        assert len(shown) in range(5, 13)
        (used,) = set(map(notation, written, map(caption, shown)))
        trained[used] += 1
    assert len(trained) == 48
    assert min(trained.values()) > 30  # 62 on average


def test_notations_of_the_test_are_never_trained_though_any_two_of_their_parts_are():
    trained, tested = set(), Counter()
    for record in records("train-notations.jsonl.gz"):
        trained.add(notation(record["texts"][2].removesuffix("\n"), caption(record["images"][1])))
    for item in records("test-notations.jsonl.gz"):
        shown = [shot["image"] for shot in item["shots"]] + [item["image"]]
        assert len(set(shown)) == len(shown) == 9
        assert all(image.startswith("test-captions.tar.gz/") for image in shown)
        (used,) = {notation(shot["answer"], caption(shot["image"])) for shot in (*item["shots"], item)}
        tested[used] += 1
    assert set(tested.values()) == {25}
    assert len(tested) == 12
    assert not trained & tested.keys()
    for absent in range(3):
        tested_pairs, trained_pairs = ({n[:absent] + n[absent + 1 :] for n in some} for some in (tested, trained))
        assert tested_pairs <= trained_pairs


def test_a_prompt_in_a_notation_is_laid_out_as_its_training_documents():
    item = records("test-notations.jsonl.gz")[7]
    for shots in (0, 4, 8):
        prompt = notation_prompt(item, shots)
        texts = [f"{shot['answer']}\n" for shot in item["shots"][:shots]]
        assert prompt[0::2] == ["write\n", *texts]
        images = [shot["image"] for shot in item["shots"][:shots]] + [item["image"]]
        for image, reference in zip(prompt[1::2], images, strict=True):
            name, member = reference.split("/")
            expected = Image.open(io.BytesIO(shard(name)[member])).convert("RGB")
            assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_sentences_are_true():
    lines = (FOLDER / "text.txt").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 600
    relation = {
        "after": lambda a, b: b == a + 1,
        "before": lambda a, b: b == a - 1,
        "between": lambda a, b, c: a < c < b and b == a + 2,
        "larger": lambda a, b: a > b,
        "smaller": lambda a, b: a < b,
        "make": lambda a, b, c: a + b == c,
    }
    for line in lines:
        if ": " in line:
            seen, claim = line.split(": ")
            if match := re.fullmatch(r"the (\w+) is (\w+)\.", claim):
                question = f"{'which' if match[1] in ('largest', 'smallest') else 'what'} is {match[1]}?"
                assert answer(question, seen) == match[2]
            else:
                question, said = groups(r"(how many \w+\?) (\w+)\.", claim)
                assert answer(question, seen) == said
        else:
            words = line.removesuffix(".").split()
            (name,) = relation.keys() & set(words)
            assert relation[name](*(NUMBERS.index(word) for word in words if word in NUMBERS)), line


def test_tokenizer_gives_back_any_text():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= 384
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>", "<image>")] == [0, 1, 2, 3]
    rng = np.random.default_rng(0)
    points = np.concatenate([np.arange(0xD800), rng.integers(0xE000, 0x110000, 5000)])
    rng.shuffle(points)
    for text in ("", " ", "\n\n  x", "three  seven", "πάντα ῥεῖ 数字 🙂\r\n\t\0", "".join(map(chr, points))):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_whole_words():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    inner = [*NUMBERS, *PLACES, "how", "many", "sixes", "sevens", "answer"]
    for word in [*NUMBERS, *(f" {word}" for word in inner), "\n", "question"]:
        assert len(tokenizer.encode(word).ids) == 1, word
    assert len(tokenizer.encode("question: how many sevens? answer: two\n").ids) == 10


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn")
    from mm1.engine.data.digits.make import make

    folder = tmp_path_factory.mktemp("digits")
    make(folder)
    return folder


def names() -> set[str]:
    return {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md", "make.py", "notations.py"}


def same(path: Path, other: Path) -> bool:
    """Return whether two files hold the same content, however it is compressed."""
    if path.read_bytes() == other.read_bytes():
        return True
    if path.name in SHARDS:
        a, b = shard(path.name, path.parent), shard(other.name, other.parent)
        return list(a) == list(b) and all(
            Image.open(io.BytesIO(a[key])).tobytes() == Image.open(io.BytesIO(b[key])).tobytes()
            if key.endswith(".png")
            else a[key] == b[key]
            for key in a
        )
    if path.name == "tokenizer.json":
        return Tokenizer.from_file(str(path)).get_vocab() == Tokenizer.from_file(str(other)).get_vocab()
    return path.suffix == ".gz" and gzip.decompress(path.read_bytes()) == gzip.decompress(other.read_bytes())


def test_making_again_gives_the_same_content(made):
    assert {path.name for path in made.iterdir()} == names()
    for name in names():
        assert same(made / name, FOLDER / name), name


def test_making_again_gives_the_same_bytes(made):
    if zlib.crc32(zlib.compress(str(list(range(9999))).encode(), 9)) != PACKED:
        pytest.skip("this zlib packs otherwise than the one that packed the files")
    for name in names():
        assert (made / name).read_bytes() == (FOLDER / name).read_bytes(), name
