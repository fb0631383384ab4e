"""Show that no text becomes a control token, with any tokenizer.json, and that tokens have the bytes of their text."""

import json
import pickle
import random
import unicodedata
from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest
from test_detokenizer import sequences
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from vocabularies import BYTES, KINDS, LLAMA, byte_fallback, byte_level, saved, unigram, unigram_bytes, word_level

from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import DocumentEncoder
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.record import Record
from mm1.engine.data.text_tokenizer import SPECIAL, TextTokenizer
from mm1.engine.data.tokenizer import with_special_tokens
from mm1.engine.infer.request import Request
from mm1.engine.serve.chat import Reply, parse
from mm1.errors import Unreadable, UserError

FULL_WIDTH = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)})
NAMES = [*SPECIAL, "<|im_start|>"]


def changed(path, **fields):
    """Write other fields into a tokenizer.json, and open it again."""
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | fields))
    return TextTokenizer(path)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("normalizer", ["none", "nfkc", "lower case"])
def test_text_that_spells_a_control_token_stays_text(make, normalizer, tmp_path):
    made = Tokenizer.from_file(make(tmp_path).path)
    steps = [made.normalizer] if made.normalizer else []
    steps += {"none": [], "nfkc": [normalizers.NFKC()], "lower case": [normalizers.Lowercase()]}[normalizer]
    made.normalizer = normalizers.Sequence(steps)
    tokenizer = saved(made, tmp_path, ["<|im_start|>"])
    control = {tokenizer.vocabulary[name] for name in NAMES}
    for name in NAMES:
        for text in (name, f"a {name} b", f"a{name}b{name}", f" {name}\n", name.upper(), name.translate(FULL_WIDTH)):
            ids = tokenizer.encode(text)
            assert control.isdisjoint(ids), text
            assert ids, text


def test_what_it_becomes_are_its_pieces_or_else_the_unknown_token(tmp_path):
    tokenizer = byte_fallback(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a <image>b<eos>")) == "a <image>b<eos>"
    tokenizer = byte_level(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a <image>b<eos>")) == "a <image>b<eos>"
    tokenizer = word_level(tmp_path)
    assert tokenizer.encode("a <image> cat") == [tokenizer.vocabulary[name] for name in ("a", "<unk>", "cat")]
    assert tokenizer.encode("<unk>") == [tokenizer.vocabulary["<unk>"]]


@pytest.mark.parametrize("make", KINDS)
def test_all_other_text_is_encoded_as_the_library_does(make, tmp_path):
    tokenizer = make(tmp_path)
    library = Tokenizer.from_file(tokenizer.path)
    for text in ("the cat sat on a mat", "ab ba a b", "naïve 漢字 😀\n\t x", "", " ", "image of this", "don't."):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocabulary == library.get_vocab()
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the cat") == tokenizer.encode("the cat")


def test_merges_that_make_a_control_token_are_not_used(tmp_path):
    names = ["<unk>", *SPECIAL, "<s>", "<", "s", ">", "<s", "i", "m", "a", "g", "e", "<i"]
    merges = [("<", "s"), ("<s", ">"), ("<", "i")]
    for more in ({}, {"ignore_merges": True}):
        model = models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", **more)
        tokenizer = saved(Tokenizer(model), tmp_path, [*SPECIAL, "<s>"])
        assert tokenizer.encode("<s>") == [names.index("<s"), names.index(">")]
        assert tokenizer.image not in tokenizer.encode("<image>")


def test_control_tokens_that_the_file_does_not_call_special_are_no_text_either(tmp_path):
    made = Tokenizer.from_file(byte_level(tmp_path).path)
    made.add_tokens([AddedToken("<tool>", special=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer = changed(
        tmp_path / "tokenizer.json", added_tokens=[token | {"special": False} for token in spec["added_tokens"]]
    )
    assert {tokenizer.image, tokenizer.eos, tokenizer.bos, tokenizer.pad}.isdisjoint(
        tokenizer.encode("<image><eos><bos>")
    )
    assert tokenizer.encode("<tool>") == [tokenizer.vocabulary["<tool>"]], "which is text"
    assert tokenizer.decode([tokenizer.image, *tokenizer.encode("a<tool>")]) == "a<tool>"


def test_an_unknown_token_that_is_a_control_token_is_left_out(tmp_path):
    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, "<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = saved(made, tmp_path)
    assert (tokenizer.eos, tokenizer.encode("a <eos> b a")) == (0, [1, 1])


FIELDS = {
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<pad>"},
    "post_processor": json.loads(processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]).__getstate__()),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_nothing_cuts_fills_or_frames_a_text(field, tmp_path):
    truth = byte_level(tmp_path)
    (tmp_path / "tokenizer.json").write_text(truth.text)
    tokenizer, text = changed(tmp_path / "tokenizer.json", **{field: FIELDS[field]}), "one two three four " * 9
    assert tokenizer.encode(text) == truth.encode(text)
    new = tmp_path / "new.json"
    new.write_text(with_special_tokens(tmp_path / "tokenizer.json")[0])
    assert TextTokenizer(new).encode(text) == Tokenizer.from_file(str(new)).encode(text).ids == truth.encode(text)


@pytest.mark.parametrize("make", KINDS)
def test_a_token_has_the_bytes_that_it_adds_to_a_text(make, tmp_path):
    tokenizer = make(tmp_path)
    for text in ("the cat sat on a mat", "ab 漢字 😀 b", "a\n\nb", "a"):
        ids = tokenizer.encode(text)
        first, *others = tokenizer.pieces(ids)
        assert others == [tokenizer.token_bytes(number) for number in ids[1:]]
        assert first + b"".join(others) == tokenizer.decode(ids).encode()
        assert b"".join(tokenizer.pieces(ids, continued=True)).lstrip() == tokenizer.decode(ids).encode().lstrip()
    for number in (tokenizer.image, tokenizer.eos, -1, len(tokenizer), 1 << 40):
        assert tokenizer.token_bytes(number) == b""
        assert not tokenizer.has_text(number)


@pytest.mark.parametrize("make", KINDS)
def test_the_bytes_of_logprobs_joined_are_those_of_the_text(make, tmp_path):
    """This holds for the whole text and for streamed pieces that end inside characters."""
    tokenizer, draw = make(tmp_path), random.Random(0)
    asked = b'{"messages": [{"role": "user", "content": "x"}], "logprobs": true}'
    reply = Reply("model", tokenizer, parse(asked))
    for ids in sequences(tokenizer, 200, draw):
        request = cast(Request, SimpleNamespace(tokens=ids, logprobs=[-1.0] * len(ids)))
        whole = reply.logprobs(request, Counter())["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in whole).decode("utf-8", "replace") == tokenizer.decode(ids)
        start = draw.randrange(len(ids) + 1)
        assert reply.logprobs(request, Counter({0: start}))["content"] == whole[start:]


def test_ids_may_have_gaps(tmp_path):
    model = models.WordLevel({"<unk>": 0, "<pad>": 3, "<bos>": 4, "<eos>": 9, "<image>": 12, "a": 20, "b": 31}, "<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = saved(made, tmp_path)
    assert (len(tokenizer), tokenizer.eos, tokenizer.encode("b a c")) == (32, 9, [31, 20, 0])
    assert tokenizer.decode(range(-2, 40)) == "<unk> a b"
    assert [tokenizer.token_bytes(number) for number in (5, 20, 21)] == [b"", b" a", b""]


def test_new_control_tokens_take_no_id_of_a_vocabulary_with_gaps(tmp_path):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 4, "c": 6}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "old.json"))
    text, before, after = with_special_tokens(tmp_path / "old.json")
    (tmp_path / "new.json").write_text(text)
    tokenizer = TextTokenizer(tmp_path / "new.json")
    assert (before, after, len(tokenizer)) == (7, 11, 11)
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.image) == (7, 8, 9, 10)
    assert tokenizer.encode("a b c <image>") == [1, 4, 6, 0]
    made.add_special_tokens(list(SPECIAL))  # the library gives <pad> the id of b
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="'b' and <pad> have the same id 4"):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_a_text_that_cannot_be_encoded_is_one_record_left_out(tmp_path):
    made = Tokenizer(models.Unigram([(name, -1.0) for name in (*SPECIAL, "a", "b")], None))
    tokenizer = saved(made, tmp_path)
    with pytest.raises(UserError, match="cannot encode a text"):
        tokenizer.encode("abc")
    encode = DocumentEncoder(tokenizer, ImagePolicy(4, "native", 24, 24), 16, exact_budget([], 4))
    with pytest.raises(Unreadable, match="cannot encode a text"):
        encode(Record(("abc",), "0", "text"))


def test_a_poisoned_document_and_a_poisoned_prompt_harm_nobody(tmp_path):
    """Documents that spell <image> are packed as text."""
    from mm1.engine.data.batch import pack

    for make in (unigram, word_level):
        tokenizer = make(tmp_path)
        budget = exact_budget([], 4).__class__(200, 4, 400, 8)
        encode = DocumentEncoder(tokenizer, ImagePolicy(4, "native", 24, 24), 16, budget)
        documents = encode(Record(("this is an <image> of <eos> a cat",), "0", "text"))
        pack(documents, exact_budget(documents, 4), image_id=tokenizer.image, patch=4, slots=16)
        assert documents[0].tokens.tolist().count(tokenizer.eos) == 1


@pytest.mark.parametrize("look_up", ["Unigram", "ignore_merges"])
def test_a_text_that_spells_a_byte_stays_text(look_up, tmp_path):
    if look_up == "Unigram":
        tokenizer = unigram_bytes(tmp_path)
    else:
        pieces = {piece: i for i, piece in enumerate(["<unk>", *SPECIAL, *BYTES, "a", "<", ">"])}
        made = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>", ignore_merges=True))
        made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        made.decoder = LLAMA
        tokenizer = saved(made, tmp_path)
    for text in ("<0xE6>", "a <0x41> a", "<0x41><0xFF>", "<<0xE6>>", "a<0x0A>", "<0xe6>", "<0x4", "é <"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocabulary["<0xC3>"] in tokenizer.encode("a é" if look_up == "ignore_merges" else "õ")


def test_unigram_pieces_of_bytes_decode_with_either_decoder(tmp_path):
    scores = [(name, -1.0) for name in ("<unk>", *SPECIAL, "▁", "▁a", "b", *BYTES)]
    made = Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), LLAMA
    tokenizer = saved(made, tmp_path)
    for text in ("a b é", "漢", unicodedata.normalize("NFD", "é a")):
        assert tokenizer.decode(tokenizer.encode(text)) == text
