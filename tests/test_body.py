"""JSON bodies: parsed they are what the json module makes of them, and what is too much is refused before it is."""

import base64
import json
import random
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from mm1.engine.data.references import BASE64_PIECE, decode_base64, decode_percent, read_image
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.run_config import DIGITS_FOLDER
from mm1.engine.serve import body
from mm1.engine.serve.body import DEPTH, DIGITS, LONG, SLICE, TEXT, VALUES, TooLarge, dumps, end_of_string, loads
from mm1.errors import Unreadable, UserError

STRINGS = (
    "",
    "a",
    'say "no"',
    "\\",
    '\\"',
    "[{]},:",
    "é😀",
    "\n\t\u2028",
    "data:,short",
    "data:image/png;base64," + "A/+=" * 2000,
    "data:image/png;base64," + "é" * 3000,
    "data:image/png;base64," + "A" * 5000 + '" says who?',
    "data: Größe" * 1000,
    "x" * 9000,
)


def some(r, depth=4):
    kind = r.randrange(7 if depth else 5)
    if kind == 5:
        return [some(r, depth - 1) for _ in range(r.randrange(5))]
    if kind == 6:
        return {f"{r.choice(STRINGS)}{i}": some(r, depth - 1) for i in range(r.randrange(5))}
    return (None, True, r.choice(STRINGS), r.randrange(-(10**18), 10**18), r.random() * 10 ** r.randrange(-9, 9))[kind]


@pytest.mark.parametrize("seed", range(200))
def test_what_is_parsed_is_what_json_parses_however_it_is_written(seed):
    r = random.Random(seed)
    value = {"value": some(r)}
    how = {"ensure_ascii": r.random() < 0.5, "indent": r.choice([None, 2]), "separators": r.choice([None, (",", ":")])}
    text = json.dumps(value, **how)
    assert loads(text.encode()) == value
    slashes = text.replace("/", "\\/")  # as PHP writes them
    assert loads(slashes.encode()) == json.loads(slashes)
    assert json.loads(dumps(value)) == value


def test_a_byte_order_mark_is_no_part_of_it():
    assert loads(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("escape", [None, "\\/", "\\u002f"])
def test_long_urls_are_whole_and_do_not_count(monkeypatch, escape):
    monkeypatch.setattr(body, "PIECE", 1000)
    urls = ["data:image/png;base64," + base64.b64encode(bytes([i]) * (TEXT // 2)).decode() for i in (0, 255, 63)]
    text = json.dumps({"list": [{"url": url} for url in urls], "text": "data:image/png," + "x" * 100})
    text = text.replace("/", escape) if escape else text
    assert len(text) > TEXT
    assert [part["url"] for part in loads(text.encode())["list"]] == urls


def test_only_the_values_of_objects_are_taken_out():
    long = "data:image/png;base64," + "A" * (2 * LONG)
    value = {"list": [long, long], long: long}
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nested {DEPTH + 1} deep, expected at most {DEPTH}"),
        ('{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), "deep"),
        ("[" * 100_000, "nested 100000 deep"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ("[1" + "0" * DIGITS + "]", f"{DIGITS + 1} digits"),
        ("[0." + "1" * 5000 + "]", "5002 digits"),
        ("[NaN]", "NaN is not"),
        ('{"a": -Infinity}', "-Infinity is not"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"url": "data:image/png;base64,' + "\\x" * LONG + '"}', "wrong escape"),
        ('{"url": "data:image/png;base64,' + "A" * LONG, "malformed JSON"),
        ('{"a": "b', "malformed JSON"),
        ("", "malformed JSON"),
        ("{} {}", "malformed JSON"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text, reason):
    with pytest.raises(UserError) as told:
        loads(text if isinstance(text, bytes) else text.encode())
    assert reason in str(told.value)
    assert len(str(told.value)) < 200


def test_depth_and_values_inside_strings_do_not_count():
    for text in ("[" * 1000 + "," * 2 * VALUES + '"\\', '\\"' + "[" * 1000, '"\\"' + "," * 2 * VALUES):
        assert loads(json.dumps({"a": text}).encode()) == {"a": text}
    with pytest.raises(UserError, match="deep"):
        loads(json.dumps({"a": "\\"}).encode()[:-1] + b', "b": ' + b"[" * 1000 + b"]" * 1000 + b"}")
    assert loads(b"[" * DEPTH + b"]" * DEPTH)


@pytest.mark.parametrize("text", [b'"' + b"a" * TEXT + b'"', b" " * (TEXT + 1), b'{"a": "' + b"data " * TEXT + b'"}',
                                  json.dumps(["data:image/png," + "A" * TEXT]).encode(),
                                  json.dumps({"text": "data: " + "A" * TEXT}).encode(),
                                  json.dumps({"text": "data:image/png," + '"' * TEXT}).encode()])  # fmt: skip
def test_more_text_than_is_accepted_is_too_large(text):
    with pytest.raises(TooLarge, match=f"more than {TEXT} bytes"):
        loads(text)


def test_what_is_well_formed_but_too_much_is_not_called_malformed():
    with pytest.raises(TooLarge, match=f"^the request has more than {VALUES} values"):
        loads(b"[" + b"[]," * VALUES + b"0]")
    for text in ("[" * 100 + "]" * 100, "[" + "1" * (DIGITS + 1) + "]"):
        with pytest.raises(UserError, match=r"^the request "):
            loads(text.encode())


def test_a_string_ends_at_its_quote_wherever_pieces_end(monkeypatch):
    r = random.Random(3)
    for piece in (2, 3, 1000):
        monkeypatch.setattr(body, "STRING_PIECE", piece)
        for _ in range(200):
            text = json.dumps("".join(r.choice('a"\\\n') for _ in range(r.randrange(12))))
            assert end_of_string(f"[{text}, {text}]".encode(), 1) == 1 + len(text)
            assert end_of_string(text[:-1].encode(), 0) == len(text) - 1


@pytest.mark.parametrize("piece", [3, 4, 7, 1 << 16])
def test_percent_encoding_in_pieces_is_percent_encoding(piece):
    r = random.Random(piece)
    for _ in range(200):
        text = "".join(r.choice("%%4aF%gG") for _ in range(r.randrange(40)))
        assert decode_percent(text, piece) == unquote_to_bytes(text)
    data = r.randbytes(300)
    signs = "".join(f"%{byte:02x}" for byte in data)
    assert decode_percent(signs, piece) == read_image(f"data:image/png,{signs}", Path()) == data
    encoded = base64.b64encode(data).decode().replace("+", "%2B").replace("/", "%2F")
    assert read_image("data:image/png;base64," + encoded, Path()) == data


@pytest.mark.parametrize("url", ["data:image/png,\ud800", "data:image/png;base64,é", "data:image/png;base64,%C3%A9",
                                 "data:" + ";" * 5000 + "," * 5000, "data:image/png" + ";" * 5000 + ","])  # fmt: skip
def test_a_data_url_that_is_none_is_refused(url):
    with pytest.raises(Unreadable):
        read_image(url, Path())


def test_other_threads_go_on_while_a_url_is_decoded():
    urls = {"data:image/png," + "%41" * 1_000_000: b"A" * 1_000_000}
    with Ticking() as ticking:
        for url, data in urls.items():
            before = ticking.ticks
            assert read_image(url, Path()) == data
            assert ticking.ticks - before > 3


def test_a_long_answer_is_written_as_json_writes_it():
    entries = [
        {"token": f"é{i}", "logprob": -i / 7, "bytes": [195, 169], "top_logprobs": []} for i in range(3 * SLICE + 1)
    ]
    value = {"choices": [{"index": 0, "logprobs": {"content": entries}, "n": None}], "e": {}, "l": [], "t": (1, 2)}
    assert dumps(value) == json.dumps(value).encode()


@pytest.mark.parametrize("size", [0, 1, 2, 3, BASE64_PIECE * 3 // 4 - 1, BASE64_PIECE * 3 // 4, BASE64_PIECE * 2 + 7])
def test_base64_in_pieces_is_base64(size):
    data = random.Random(size).randbytes(size)
    text = base64.b64encode(data).decode()
    assert decode_base64(text) == data
    assert decode_base64(" ".join(text[i : i + 77] for i in range(0, len(text), 77))) == data


@pytest.mark.parametrize("text", ["A", "AAA", "AA=", "A" * BASE64_PIECE + "é===", "AA==" + " " * BASE64_PIECE + "AAAA",
                                  "A" * (BASE64_PIECE - 4) + "AA==AAAA", "A-_A", "===="])  # fmt: skip
def test_broken_base64_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        decode_base64(text)


class Ticking:
    """Counts what another thread does meanwhile, which is nothing as long as a call keeps the interpreter's lock."""

    def __enter__(self):
        self.ticks, self.ended, self.interval = 0, False, sys.getswitchinterval()
        sys.setswitchinterval(100)  # nobody is made to give up the lock between two instructions
        self.thread = threading.Thread(target=self.tick)
        self.thread.start()
        return self

    def tick(self):
        while not self.ended:
            self.ticks += 1
            time.sleep(0.0005)

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()
        sys.setswitchinterval(self.interval)


def test_other_threads_go_on_while_a_long_text_is_encoded():
    tokenizer = TextTokenizer(DIGITS_FOLDER / "tokenizer.json")
    text = "question: how many sevens? answer: " * 10_000
    with Ticking() as ticking:
        before = ticking.ticks
        ids = tokenizer.encode(text)
        meanwhile = ticking.ticks - before
    assert meanwhile > 10
    piece = tokenizer.encode("question: how many sevens? answer: " * 2)
    assert ids[: len(piece) // 2] == piece[: len(piece) // 2]
