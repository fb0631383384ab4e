"""Whether a text is done is told from its end, as it would be from the whole of it."""

import random

import pytest
from small import FOLDER
from tokenizers import AddedToken, Tokenizer, decoders, models

from mm1.engine.data.document import SPECIAL, TextTokenizer
from mm1.engine.detokenizer import Text

CHARACTERS = "é漢😀"


def byte_fallback(folder):
    """Like Llama's: pieces with "▁", characters in bytes, a leading space that is stripped."""
    pieces = [
        "<unk>",
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "ba",
        "\n",
        "é",
    ]
    kind = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    kind.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    kind.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    kind.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder / "tokenizer.json")


def byte_level(folder):
    return TextTokenizer(FOLDER / "tokenizer.json")


def word_pieces(folder):
    pieces = ["<unk>", *SPECIAL, "a", "b", "##a", "##b", ".", "don", "'t", "##."]
    kind = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    kind.decoder = decoders.WordPiece()
    kind.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    kind.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder / "tokenizer.json")


MAKES = [byte_fallback, byte_level, word_pieces]


def texts(tokenizer, count, draw):
    """Yield tokens of every kind, of some more often: runs of bytes, whole characters, special tokens, half ones."""
    ids = tokenizer.vocabulary
    kinds = [tokenizer.encode(text) for text in (CHARACTERS, "ab", "a b", "\n", "漢" * 9)]
    kinds += [[ids.get("<0xFF>", 7)], [tokenizer.image] * 3, [tokenizer.pad], list(range(4, min(len(ids), 384)))]
    for _ in range(count):
        tokens = []
        for _ in range(draw.randrange(1, 30)):
            of = draw.choice(kinds) or [5]
            start = draw.randrange(len(of))
            tokens += of[start : start + draw.randrange(1, 6)] if draw.random() < 0.7 else of[:30]
        yield [token for token in tokens if token != tokenizer.eos]


@pytest.mark.parametrize("make", MAKES)
def test_a_text_is_done_with_the_token_that_completes_a_stop_string(make, tmp_path):
    """At every length up to the first: as if the whole were decoded."""
    tokenizer, draw, done, long = make(tmp_path), random.Random(0), 0, 0
    for tokens in texts(tokenizer, 60, draw):
        whole = tokenizer.decode(tokens)
        at = draw.randrange(len(whole) + 1)
        stops = [
            whole[at : at + draw.choice([1, 2, 5, 12])],
            draw.choice(["\n", "ab a", "é", "A", "\ufffd\ufffd", "b\ufffd"]),
        ]
        grown = Text(tokenizer, stops, None)
        for n in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:n])
            expected = any(stop in text for stop in grown.stop)
            assert grown.ends(tuple(tokens[:n])) == expected, (stops, text)
            if expected:
                done += 1
                long += n > 40
                break
    assert done > 30
    assert long


def test_end_of_text_ends_it_and_without_stop_strings_nothing_else_does():
    tokenizer = byte_level(None)
    assert Text(tokenizer, [], None).ends((5, tokenizer.eos))
    assert not Text(tokenizer, [""], None).ends((5, 6))


@pytest.mark.parametrize("make", MAKES)
def test_long_texts_cost_no_more_than_short_ones(make, tmp_path, monkeypatch):
    tokenizer = make(tmp_path)
    tokens, decoded = tuple(tokenizer.encode("abab") * 1000), []
    plain = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or plain(ids))
    text = Text(tokenizer, ["\n", "no such"], None)
    for n in (100, len(tokens)):
        decoded.clear()
        assert not text.ends(tokens[:n])
        assert sum(decoded) < 100
