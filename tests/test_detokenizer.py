"""Any sequence of ids has one text: streamed, at the end, and by definition; and it ends where a stop string does."""

import random

import pytest
from small import small_mm1
from tokenizers import Tokenizer
from vocabularies import BYTES, KINDS, byte_fallback, byte_level, unigram_bytes

from mm1.engine.infer.detokenizer import TextStream
from mm1.engine.infer.generate import generate

CHARACTERS = "é漢😀"
COUNT = 3000


def sequences(tokenizer, count, draw, longest=30):
    """Yield ids of every kind, of some more often: bytes, whole characters and halves, control tokens, of no token."""
    ids = tokenizer.vocabulary
    kinds = [tokenizer.encode(text) for text in (CHARACTERS, "ab", "a b", "\n", "漢" * 9)]
    kinds += [[ids.get("<0xFF>", 7)], [tokenizer.image] * 3, [tokenizer.pad], [len(tokenizer) + 3, -1, 1 << 40]]
    kinds += [[ids[byte] for byte in BYTES if byte in ids], list(range(4, min(len(tokenizer), 384)))]
    for _ in range(count):
        tokens = []
        for _ in range(draw.randrange(1, longest)):
            of = draw.choice(kinds) or [5]
            start = draw.randrange(len(of))
            tokens += of[start : start + draw.randrange(1, 6)] if draw.random() < 0.7 else of[:30]
        yield [token for token in tokens if token != tokenizer.eos]


def streamed(tokenizer, ids, stop=()):
    sent = []
    text = TextStream(tokenizer, stop, sent.append)
    for number in ids:
        text.add(number)
    text.finish()
    return text.text, "".join(sent)


def joined_bytes(tokenizer, ids, drop_any):
    """The text of a vocabulary with byte fallback: bytes are bytes, "▁" is a space, but not at the beginning.

    drop_any: the first piece is without its "▁" (Metaspace); else the text is without its first space (Llama's).
    """
    control = {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.image}
    names = {number: name for name, number in tokenizer.vocabulary.items() if number not in control}
    pieces = [names[number] for number in ids if number in names]
    if drop_any and pieces:
        pieces[0] = pieces[0].replace("▁", "")
    data = b"".join(bytes([BYTES.index(p)]) if p in BYTES else p.replace("▁", " ").encode() for p in pieces)
    return (data if drop_any else data.removeprefix(b" ")).decode("utf-8", "replace")


def is_whole(data):
    try:
        return bool(data.decode()) or True
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("make", KINDS)
def test_streamed_text_is_the_final_text_is_the_decoding_of_all_ids(make, tmp_path):
    tokenizer = make(tmp_path)
    library = Tokenizer.from_file(tokenizer.path)
    compared = broken = 0
    for ids in sequences(tokenizer, COUNT, random.Random(0)):
        text = tokenizer.decode(ids)
        assert streamed(tokenizer, ids) == (text, text), ids
        data = b"".join(tokenizer.pieces(ids))
        assert data.decode("utf-8", "replace") == text
        broken += not is_whole(data)
        if make in (byte_fallback, unigram_bytes):
            assert text == joined_bytes(tokenizer, ids, make is unigram_bytes)
        if is_whole(data) or make is byte_level:  # the library replaces each byte of a broken run of byte fallback
            compared += 1
            known = [number for number in ids if 0 <= number < len(tokenizer)]
            assert text == library.decode(known, skip_special_tokens=True), ids
    assert compared > 300
    assert (broken > 300) == (make in (byte_fallback, byte_level, unigram_bytes))


@pytest.mark.parametrize("data, text", [
    (b"\xff", "\ufffd"), (b"\xe6\xbc", "\ufffd"), (b"\xe6\xbc\xe6\xbc\xa2", "\ufffd漢"), (b"\xf0\x9f\x98\x80", "😀"),
    (b"\xf0\x9f\x98A", "\ufffdA"), (b"\xc3\xff\xc3\xa9", "\ufffd\ufffdé"), (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    (b"\xe6\xbc" * 31, "\ufffd" * 31), ("漢".encode() * 10 + b"\xe6", "漢" * 10 + "\ufffd"),
])  # fmt: skip
def test_a_broken_character_is_one_replacement_character(data, text, tmp_path):
    tokenizer = byte_fallback(tmp_path)
    ids = [tokenizer.vocabulary[BYTES[byte]] for byte in data]
    assert streamed(tokenizer, ids) == (text, text)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, [*ids, tokenizer.eos]) == (text, text), "also before end-of-text"
    word = [tokenizer.vocabulary["▁a"]]
    assert streamed(tokenizer, [*ids, *word])[1] == text + " a"
    assert streamed(tokenizer, [*word, *ids])[1] == "a" + text, "as a first one the word is without its space"


@pytest.mark.parametrize("make", KINDS)
def test_a_text_ends_before_the_first_stop_string_and_says_nothing_of_it(make, tmp_path):
    tokenizer, draw, stopped = make(tmp_path), random.Random(1), 0
    for ids in sequences(tokenizer, 500, draw, 12):
        whole = tokenizer.decode(ids)
        at = draw.randrange(len(whole) + 1)
        stop = draw.choice([whole[at : at + draw.choice([1, 2, 5, 12])], "ab a", "é", "\ufffd\ufffd", "b\ufffd"]) or "x"
        text = whole.partition(stop)[0]
        assert streamed(tokenizer, ids, (stop,)) == (text, text), (ids, stop)
        stopped += text != whole
    assert stopped > 60


@pytest.mark.parametrize("make", KINDS)
def test_a_search_sees_a_text_end_at_the_token_at_which_it_ends(make, tmp_path):
    tokenizer, draw, done, long = make(tmp_path), random.Random(0), 0, 0
    for tokens in sequences(tokenizer, 60, draw):
        whole = tokenizer.decode(tokens)
        at = draw.randrange(len(whole) + 1)
        stops = [
            whole[at : at + draw.choice([1, 2, 5, 12])],
            draw.choice(["\n", "ab a", "é", "\ufffd\ufffd", "b\ufffd"]),
        ]
        grown, search = TextStream(tokenizer, stops, None), TextStream(tokenizer, stops, None)
        for n, token in enumerate(tokens, 1):
            grown.add(token)
            assert search.ends(tuple(tokens[:n])) == grown.done, (stops, tokens[:n])
            if grown.done:
                done += 1
                long += n > 40
                break
    assert done > 20
    assert long


def test_stop_strings_are_looked_for_at_few_places_however_many_and_long_they_are():
    """Only where a held end goes on, or a new piece begins."""
    tokenizer, asked = byte_level(None), []

    class Stop(str):
        def startswith(self, *args):
            asked.append(args)
            return str.startswith(self, *args)

    text = TextStream(tokenizer, [Stop(f"{i:02}" * 128) for i in range(16)], None)
    ids = tokenizer.encode("the cat sat on the mat. " * 20)
    for number in ids:
        text.add(number)
    assert len(asked) == 16 * len("the cat sat on the mat. " * 20)


def test_end_of_text_ends_it_and_without_stop_strings_nothing_else_does():
    tokenizer = byte_level(None)
    assert TextStream(tokenizer, [], None).ends((5, tokenizer.eos))
    assert not TextStream(tokenizer, [""], None).ends((5, 6))


class Counting:
    """A tokenizer that counts the tokens of which it returns the bytes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos, self.has_text, self.count = tokenizer, tokenizer.eos, tokenizer.has_text, 0

    def pieces(self, ids, continued=False):
        self.count += len(ids)
        return self.tokenizer.pieces(ids, continued)

    def token_bytes(self, token):
        self.count += 1
        return self.tokenizer.token_bytes(token)


@pytest.mark.parametrize("make", KINDS)
def test_a_token_costs_the_same_however_long_the_text_is(make, tmp_path):
    tokenizer = Counting(make(tmp_path))
    ids = tuple((tokenizer.tokenizer.encode("a b漢") or [5]) * 1000)
    text = TextStream(tokenizer, ["\n", "no such"], None)
    for number in ids:
        text.add(number)
    assert tokenizer.count == len(ids)
    for n in (100, len(ids)):
        tokenizer.count = 0
        assert not text.ends(ids[:n])
        assert tokenizer.count < 100


@pytest.mark.parametrize("how", [{"temperature": 3.0, "seed": 0}, {"num_beams": 3}, {"temperature": 3.0, "stop": "b"}])
@pytest.mark.parametrize("make", KINDS)
def test_a_model_that_writes_anything_loses_no_text(make, how, tmp_path):
    """Also rows of the embedding that stand for no token are drawn."""
    model = small_mm1(seed=1).eval()
    model.tokenizer = make(tmp_path)
    assert len(model.tokenizer) <= 384
    heard = {0: "", 1: "", 2: ""}
    texts = generate(
        model,
        [["a"], ["b b"], ["the cat"]],
        max_tokens=60,
        on_text=lambda i, piece: heard.update({i: heard[i] + piece}),
        **how,
    )
    assert texts == list(heard.values())
    assert any(texts) or how.get("num_beams")
    assert not any(how.get("stop", "\0") in text for text in texts)


def test_listeners_hear_each_piece_once_even_if_they_end_the_text():
    tokenizer, heard = byte_level(None), []

    def listen(piece):
        heard.append(piece)
        if len(heard) == 2:
            text.finish()

    text = TextStream(tokenizer, (), listen)
    for number in tokenizer.encode("one two three"):
        text.add(number)
    text.finish()
    assert "".join(heard) == "one two three"
