import dataclasses
import itertools
import json

import numpy as np
import pytest
from small import FOLDER, IMAGE, PATCH, SLOTS, small_run

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.config import Source
from mm1.engine.data.document import Budget, DocumentEncoder
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import Loader
from mm1.engine.data.quarantine import Quarantine
from mm1.engine.data.record import Answer, Media, Record
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.errors import Unreadable, UserError

TOKENIZER = TextTokenizer(FOLDER / "tokenizer.json")
POLICY = ImagePolicy(PATCH, "native", 24, 64)


def loader(**changes) -> Loader:
    run = small_run()
    streams = make_streams(dataclasses.replace(run, data=dataclasses.replace(run.data, **changes)), TOKENIZER, None)
    return streams.loaders[0]


def png(height=12, width=12) -> Media:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return Media("image", out.getvalue())


def encode(*parts, tokens=40, images=3, patches=64):
    encoder = DocumentEncoder(TOKENIZER, POLICY, SLOTS, Budget(tokens, images, patches, 8))
    return encoder(Record(parts, "7", "shard"))


def test_batches_keep_to_their_budget_and_fill_it():
    run, batches = small_run(), loader()
    fills = []
    for _ in range(40):
        batch = next(batches)
        assert batch.tokens.shape == (160,)
        assert len(batch.media.grids.sizes) <= 16
        assert batch.media.grids.used <= 512 == batch.media.grids.patches
        assert batch.media.slots.shape == (16 * SLOTS,)
        assert len(batch.keys) <= run.data.documents
        fills.append(batch.used_tokens / 160)
    assert np.mean(fills) > 0.95


def test_every_document_comes_once_an_epoch():
    keys = []
    batches = loader(sources=small_run().data.sources[:1])
    while len(keys) < 1359:
        keys += next(batches).keys
    # The packer holds back at most its buffer, so nearly all of the first epoch is out, and hardly any twice.
    assert len(set(keys)) > 1359 - 2 * 60 - 24


def test_the_mixture_keeps_to_its_shares_of_tokens():
    batches, tokens = loader(), {"captions": 0, "text": 0}
    for _ in range(100):
        batch = next(batches)
        for key, length in zip(batch.keys, batch.cu_seqlens.diff().tolist()):
            tokens["captions" if "captions" in key else "text"] += length
    assert abs(tokens["captions"] / sum(tokens.values()) - 45 / 55) < 0.03


@pytest.mark.parametrize("workers", [0, 2])
def test_state_restores_the_exact_batches_to_come(workers):
    first = loader()
    for _ in range(7):
        next(first)
    state = json.loads(json.dumps(first.state()))
    truth = [next(first) for _ in range(5)]
    second = loader(workers=workers)  # another number of workers gives the same stream
    second.restore(state)
    for expected in truth:
        batch = next(second)
        assert batch.keys == expected.keys
        assert batch.tokens.equal(expected.tokens)
        assert batch.media.values.equal(expected.media.values)


def test_the_seed_decides_the_order():
    run = small_run()
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=1))
    a, b, c = (next(make_streams(r, TOKENIZER, None)).keys for r in (run, run, other))
    assert a == b != c


def test_long_documents_are_cut_and_nothing_is_lost():
    text = "three and four make seven. " * 20
    pieces = encode(text)
    assert all(len(piece.tokens) <= 40 for piece in pieces)
    assert np.concatenate([p.tokens for p in pieces]).tolist() == [1, *TOKENIZER.encode(text), 2]
    assert [p.key for p in pieces[:2]] == ["shard:7", "shard:7+1"]


def test_a_document_of_forty_images_becomes_several():
    parts = [part for i in range(40) for part in (png(), f" {i}")]
    pieces = encode(*parts)
    assert sum(len(p.media) for p in pieces) == 40
    assert all(len(p.media) <= 3 and len(p.tokens) <= 40 and p.patches(PATCH) <= 64 for p in pieces)
    for piece in pieces:
        assert (piece.tokens == IMAGE).sum() == SLOTS * len(piece.media)


def test_patches_of_a_document_of_large_images_are_divided_too():
    pieces = encode(*(part for i in range(6) for part in (png(24, 24), f" {i}")), tokens=200, images=9, patches=80)
    assert [len(p.media) for p in pieces] == [2, 2, 2]
    assert all(p.patches(PATCH) == 72 for p in pieces)


def test_special_tokens_in_a_text_stay_text():
    (piece,) = encode("<image> <eos>")
    assert not set(piece.tokens[1:-1].tolist()) & {0, 1, 2, 3}
    assert TOKENIZER.decode(piece.tokens.tolist()) == "<image> <eos>"


def test_an_image_larger_than_the_budget_is_unreadable():
    with pytest.raises(Unreadable, match="64 patches exceeds the packing budget"):
        encode(png(32, 32), "x", patches=63)


class Flaky:
    """Have records of which every third is broken."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        if i % 3 == 0:
            raise Unreadable("broken image", "a.tar")
        return Record((f"number {i}",), str(i), "a.tar")


class Broken(Flaky):
    def __getitem__(self, i):
        raise Unreadable("broken image", "b.tar")


def flaky_loader(tmp_path, *sources):
    budget = Budget(60, 1, 64, 8)
    mixture = Mixture(sources, [1.0] * len(sources), DocumentEncoder(TOKENIZER, POLICY, SLOTS, budget), 0)
    listed = Quarantine(tmp_path / "quarantine")
    return Loader(mixture, budget, image_id=IMAGE, patch=PATCH, slots=SLOTS, buffer=60, quarantine=listed)


def quarantined(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "quarantine" / "rank-00000.jsonl").read_text().splitlines()]


def test_unreadable_records_are_skipped_counted_and_listed_once_however_often_they_come(tmp_path):
    batches = flaky_loader(tmp_path, Flaky())
    for _ in range(20):
        next(batches)
    lines = quarantined(tmp_path)
    assert batches.drawn == batches.position > 3 * 30  # records: more than three epochs
    assert 3 * batches.skipped - batches.drawn in range(-3 * 10, 3 * 10)  # every third
    assert sorted(int(line["key"]) for line in lines) == list(range(0, 30, 3))
    assert all(line["position"] < 30 for line in lines)  # of the first epoch
    assert {(line["shard"], line["reason"]) for line in lines} == {("a.tar", "broken image")}


def test_a_hundred_in_a_row_of_one_source_stop_the_run_and_name_the_shard(tmp_path):
    batches = flaky_loader(tmp_path, Flaky(), Broken())
    with pytest.raises(
        UserError,
        match=r"b\.tar: 100 unreadable records in a row \(setting data\.max_bad\), the last one: broken image",
    ):
        list(itertools.islice(batches, 100))
    assert sum(line["shard"] == "b.tar" for line in quarantined(tmp_path)) == 30  # different ones


@pytest.mark.parametrize("parts", [(png(),), (png(), png()), tuple(png() for _ in range(7))], ids=["1", "2", "7"])
def test_a_document_of_images_alone_is_unreadable_and_never_trains_on_its_end(parts):
    with pytest.raises(Unreadable, match="no target text besides its media"):
        encode(*parts)


def test_pieces_of_which_the_end_alone_could_be_learned_are_left_out():
    """The end after a text is a target; the end after images in their own piece is not."""
    first, *rest = encode("one ", *(png() for _ in range(7)))
    assert first.targets(IMAGE).any()
    assert not rest
    (text,) = encode("one")
    assert text.tokens[1:][text.targets(IMAGE)].tolist() == [*TOKENIZER.encode("one"), TOKENIZER.eos]
    (document,) = encode("one ", png())  # an end after an image in a document with text
    assert document.tokens[1:][document.targets(IMAGE)].tolist() == [*TOKENIZER.encode("one "), TOKENIZER.eos]


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_first_and_the_last_seed_shuffle_several_sources(seed):
    run = small_run(seed=seed)
    three = (*run.data.sources, run.data.sources[0])
    streams = make_streams(dataclasses.replace(run, data=dataclasses.replace(run.data, sources=three)), TOKENIZER, None)
    assert {key.rpartition("/")[2].split(":")[0] for key in next(streams).keys + next(streams).keys} == {
        "test-captions.tar.gz", "text.txt",
    }  # fmt: skip


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no such tokenizer"):
        TextTokenizer(tmp_path / "other.json")


def test_of_a_conversation_answers_and_their_ends_alone_are_targets():
    parts = ("USER: ", png(), "how many? ASSISTANT:", Answer(" two"), "USER: sure? ASSISTANT:", Answer(" yes"))
    (document,) = encode(*parts, tokens=200)
    batch = pack([document], exact_budget([document], PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)
    learned = batch.targets[batch.target_rows].tolist()
    eos = TOKENIZER.eos
    assert learned == [*TOKENIZER.encode(" two"), eos, *TOKENIZER.encode(" yes"), eos]
    # The row before an answer's first token is the last of the question.
    asked = document.tokens[: int(batch.target_rows[0]) + 1].tolist()
    assert asked[-3:] == TOKENIZER.encode("how many? ASSISTANT:")[-3:]
    assert (document.tokens == eos).sum() == 2


def test_pieces_of_a_long_conversation_keep_questions_from_being_targets():
    long = "why? " * 30
    pieces = encode(f"USER: {long} ASSISTANT:", Answer(f" {long}"), tokens=40)
    learned = [t for piece in pieces for t in piece.tokens[1:][piece.targets(IMAGE)].tolist()]
    whole = [*TOKENIZER.encode(f" {long}"), TOKENIZER.eos]
    assert len(whole) - len(pieces) <= len(learned) < len(whole)  # the first of a piece is nobody's target
    assert all(piece.targets(IMAGE).any() for piece in pieces)
    assert len(pieces) < len(encode(f"USER: {long} ASSISTANT:", f" {long}", tokens=40))  # pieces of the question went


def test_answers_are_what_a_run_learns(tmp_path):
    talks = [{"conversations": [{"from": "human", "value": f"number {n}?"}, {"from": "gpt", "value": f"{n}"}]}
             for n in range(50)]  # fmt: skip
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    batch = next(loader(sources=(Source("conversations", (str(tmp_path / "talks.json"),)),)))
    tokens = sum(len(TOKENIZER.encode(f" {talks[int(key.rpartition(':')[2])]['conversations'][1]['value']}")) + 1
                 for key in batch.keys)  # fmt: skip
    assert batch.target_count == tokens > 0
