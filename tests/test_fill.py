"""Show how full batches are for documents of any lengths, which documents they take, and how a run warns."""

import collections
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from small import IMAGE, PATCH, small_run

from mm1.engine.data.config import Source
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.mixture import Drawn
from mm1.engine.data.packing import BUFFER, Loader
from mm1.engine.data.record import View
from mm1.engine.data.streams import Streams, make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.run_config import DIGITS_RUN
from mm1.errors import UserError

T, SLOTS = 1024, 16


class Stream:
    """Yield the records that `draw` makes from a generator and a position: documents as lists of parts.

    A number is a text of that many tokens, a pair an image of that many patches.
    """

    def __init__(self, draw):
        self.draw, self.reads = draw, collections.Counter()

    def __getitem__(self, position):
        self.reads[position] += 1
        pieces = self.draw(np.random.default_rng(position), position)
        documents = [self.document(parts, f"{position}+{i}") for i, parts in enumerate(pieces)]
        return Drawn(0, "shard", str(position), documents, None)

    def iterate(self, position, workers, stride=1):
        while True:
            yield self[position]
            position += stride

    def document(self, parts, key):
        tokens, views = [1], []
        for part in parts:
            if isinstance(part, tuple):
                tokens += [IMAGE] * SLOTS
                views.append(View("image", np.zeros((part[0] * PATCH, part[1] * PATCH, 3), np.uint8)))
            else:
                tokens += range(10, 10 + part)
        return Document(np.array([*tokens, 2], np.int32), tuple(views), key)


def text(length, limit=T):
    """Return a text of `length` tokens, cut into sequences as the encoder cuts it."""
    lengths = [limit] * (length // limit) + ([length % limit] if length % limit > 2 else [])
    return [[n - 2] for n in lengths]


def caption(r, side=(4, 6)):
    return [[side, int(r.integers(10, 30))]]


def interleaved(r, images):
    return [[part for _ in range(images) for part in ((4, 6), int(r.integers(10, 40)))]]


CASES = {
    "alike, short": lambda r, p: text(20),
    "alike, three tokens": lambda r, p: text(3),
    "alike, 0.35 of a sequence": lambda r, p: text(358),
    "alike, 0.6 of a sequence": lambda r, p: text(614),
    "log-normal around 60": lambda r, p: text(3 + int(r.lognormal(np.log(60), 1))),
    "log-normal around 800": lambda r, p: text(3 + int(r.lognormal(np.log(800), 1))),
    "0.3 to 0.6 of a sequence": lambda r, p: text(int(r.uniform(0.3, 0.6) * T)),
    "one long among 50 short": lambda r, p: text(T if p % 50 == 0 else 20),
    "long and short by turns": lambda r, p: text(T if p % 2 else 20),
    "captions that exhaust the images": lambda r, p: caption(r),
    "captions and text that exhaust the images": lambda r, p: caption(r) if p % 3 else text(int(r.integers(20, 60))),
    "captions that exhaust the patches": lambda r, p: caption(r, (int(r.integers(6, 11)), int(r.integers(6, 11)))),
    "nine images of sixteen a sequence": lambda r, p: interleaved(r, 9),
    "one to ten images": lambda r, p: interleaved(r, int(r.integers(1, 11))),
}


def loader(draw, buffer=BUFFER * T, documents=T // 3, **changes) -> Loader:
    budget = dataclasses.replace(Budget(tokens=T, media=16, patches=384, documents=documents), **changes)
    return Loader(Stream(draw), budget, image_id=IMAGE, patch=PATCH, slots=SLOTS, buffer=buffer)


@pytest.mark.parametrize("draw", CASES.values(), ids=CASES)
def test_the_fullest_budget_is_filled_whatever_the_lengths(draw):
    batches, fills = loader(draw), collections.Counter()
    for _ in range(100):
        next(batches)
        fills.update(batches.shares)
    assert max(fills["tokens"], fills["media"], fills["patches"]) >= 95


@pytest.mark.parametrize("tokens, count", [(768, 40), (4096, 12), pytest.param(16384, 100, marks=pytest.mark.slow)])
def test_sequences_of_the_demos_documents_are_full_at_any_length(tokens, count):
    data = dataclasses.replace(
        DIGITS_RUN.data, tokens=tokens, images=tokens // 16, patches=tokens * 460 // 768, documents=0
    )
    streams = make_streams(dataclasses.replace(DIGITS_RUN, data=data), TextTokenizer(data.tokenizer), None)
    fills = [next(streams).used_tokens / tokens for _ in range(count)]
    assert np.mean(fills) >= 0.97


def test_as_many_documents_fit_as_the_shortest_need(tmp_path):
    (tmp_path / "short.txt").write_text("1\n" * 500)
    data = {"sources": (Source("text", (str(tmp_path / "short.txt"),)),), "documents": 0}
    streams = streams_of(lambda message: pytest.fail(message), **data)
    assert np.mean([next(streams).used_tokens / 160 for _ in range(25)]) >= 0.95


def test_each_batch_takes_the_largest_that_fits_then_the_next_largest():
    """The rule itself is applied to copies of the pool."""
    batches = loader(lambda r, p: caption(r, (2, int(r.integers(1, 9)))) if p % 2 else text(int(r.lognormal(4, 1)) + 3))
    for _ in range(50):
        batches.fill_pool()
        pool, budget = list(batches.waiting), batches.budget
        room, keys = np.array([budget.tokens, budget.media, budget.patches]), []
        total = room.copy()
        while fitting := [w for w in pool if (np.array([w.tokens, w.media, w.patches]) <= room).all()]:
            size = {w.whole.key: (np.array([w.tokens, w.media, w.patches]) / total).max() for w in fitting}
            best = min(fitting, key=lambda w: (-size[w.whole.key], w.age))
            room -= [best.tokens, best.media, best.patches]
            keys.append(best.whole.key)
            pool.remove(best)
        assert collections.Counter(next(batches).keys) == collections.Counter(keys)


def test_documents_stay_whole_where_that_fills_the_batch():
    for name in ("log-normal around 60", "one long among 50 short", "one to ten images", "alike, short"):
        batches = loader(CASES[name])
        keys = [key for _ in range(50) for key in next(batches).keys]
        assert sum("@" in key for key in keys) <= 0.03 * len(keys), name


@pytest.mark.parametrize("name", ["alike, 0.6 of a sequence", "nine images of sixteen a sequence"])
def test_of_a_document_that_is_cut_every_token_and_image_comes_once_and_in_order(name):
    batches, parts = loader(CASES[name]), collections.defaultdict(list)
    for _ in range(60):
        batches.fill_pool()
        for document in batches.take_documents():
            key, _, start = document.key.partition("@")
            parts[key].append((int(start or 0), document))
    waiting = {w.whole.key for w in batches.waiting}
    whole = {key: [d for _, d in sorted(pieces, key=lambda p: p[0])] for key, pieces in parts.items()}
    assert sum(len(pieces) > 1 for pieces in whole.values()) > 10
    for key, pieces in whole.items():
        if key not in waiting:
            truth = batches.mixture[int(key.partition("+")[0])].documents[0]
            assert np.concatenate([d.tokens for d in pieces]).tolist() == truth.tokens.tolist()
            assert [x.values.shape for d in pieces for x in d.media] == [x.values.shape for x in truth.media]
        for piece in pieces:
            assert (piece.tokens == IMAGE).sum() == SLOTS * len(piece.media)
            assert (piece.tokens[1:] != IMAGE).sum() > 1  # something to learn


def test_no_caption_loses_its_image_and_no_answer_its_question():
    long = loader(lambda r, p: [[(4, 6), 600]])
    assert not any("@" in key for _ in range(20) for key in next(long).keys)
    asked = loader(lambda r, p: text(614))
    read = asked.mixture.document
    asked.mixture.document = lambda parts, key: dataclasses.replace(read(parts, key), prompt_mask=np.arange(614) < 300)
    assert not any("@" in key for _ in range(20) for key in next(asked).keys)


def test_a_document_that_others_always_outdo_comes_all_the_same():
    """Pairs of documents of half a sequence always fill it, and one document is smaller."""
    batches = loader(lambda r, p: text(400 if p == 0 else 512))
    keys = [key for _ in range(200) for key in next(batches).keys]
    assert "0+0" in keys


@pytest.mark.parametrize("name", ["alike, 0.6 of a sequence", "log-normal around 60", "one to ten images"])
def test_the_state_restores_the_batches_to_come_also_amid_documents_that_are_cut(name):
    first = loader(CASES[name])
    for _ in range(9):
        next(first)
    state = json.loads(json.dumps(first.state()))
    truth = [next(first).keys for _ in range(30)]
    second = loader(CASES[name])
    second.restore(state)
    assert [next(second).keys for _ in range(30)] == truth


def test_a_restored_pool_reads_each_record_once():
    """A record of many pieces would otherwise be decoded for each of them."""
    first = loader(lambda r, p: text(50 * T) if p == 0 else text(100))
    for _ in range(5):
        next(first)
    second = loader(first.mixture.draw)
    second.restore(first.state())
    assert len(second.waiting) > 40
    assert set(second.mixture.reads.values()) == {1}


def test_pixels_that_wait_are_bounded_by_the_patches_of_as_many_batches():
    """With small texts and large images, a limit of tokens alone would let 20 times the patches wait."""
    batches = loader(lambda r, p: [[(10, 10), 8]])
    for _ in range(20):
        next(batches)
        batches.fill_pool()
        assert 3 * 384 < sum(w.patches for w in batches.waiting) < BUFFER * 384 + 100


def streams_of(warn, quarantine=None, **data) -> Streams:
    run = small_run()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **data))
    return make_streams(run, TextTokenizer(run.data.tokenizer), quarantine, warn)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"images": 2}, "data.images (2) is used up first: raise data.images or lower data.tokens"),
        ({"patches": 64}, "data.patches (64) is used up first: raise data.patches or lower data.tokens"),
        ({"documents": 3}, "data.documents (3) is used up first: raise data.documents or lower data.tokens"),
    ],
    ids=["images", "patches", "documents"],
)
def test_half_empty_sequences_are_warned_of_once_with_the_setting_to_change(data, message):
    warnings, captions = [], small_run().data.sources[:1]
    streams = streams_of(warnings.append, sources=captions, tokens=400, **data)
    for i in range(60):
        next(streams)
        assert len(warnings) == (i >= 19)
    assert warnings[0].endswith(message)
    assert warnings[0].startswith("the first 20 sequences hold ")


def test_full_sequences_and_rare_bad_records_are_not_warned_of(tmp_path):
    lines = ["3 and 4 make 7"] * 60
    lines[5] = '{"text": '
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": x}) if x[0] != "{" else x for x in lines))
    sources = (Source("text", (str(tmp_path / "some.jsonl"),)),)
    streams = streams_of(lambda message: pytest.fail(message), tmp_path / "quarantine", sources=sources)
    for _ in range(40):
        next(streams)
    assert 0 < streams.skipped < 0.05 * streams.drawn


def test_many_bad_records_are_warned_of_once_with_reason_example_and_list(tmp_path):
    bad = {3: '{"text": ""}', 9: '{"text": ""}', 15: '{"text": 5}'}
    lines = [bad.get(i, '{"text": "3 and 4 make 7"}') for i in range(20)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    sources, warnings = (Source("text", (str(tmp_path / "some.jsonl"),)),), []
    streams = streams_of(warnings.append, tmp_path / "quarantine", sources=sources)
    for _ in range(40):
        next(streams)
    (warning,) = warnings
    assert re.match(r"\d+ of \d+ records \(1\d%\) could not be used; ", warning)
    assert f"most frequent, of 2 different ones: empty text ({tmp_path / 'some.jsonl'}: " in warning
    assert warning.endswith(f"all are listed in {tmp_path / 'quarantine'}")
    assert sum(streams.quarantine.summary().values()) == 3


def test_a_buffer_of_less_than_a_sequence_is_one_sequence():
    warnings: list[str] = []
    streams = streams_of(warnings.append, buffer=64)
    assert warnings == ["setting data.buffer is 64 tokens, less than a sequence: 160 are used"]
    assert torch.equal(next(streams).tokens, next(streams_of(print, buffer=160)).tokens)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"patches": 63}, "setting data.patches is 63, too few for one image, expected 64"),
        ({"images": 0}, "data.images is 0"),
    ],
)
def test_budgets_that_hold_no_document_or_image_are_refused(data, message):
    with pytest.raises(UserError) as error:
        streams_of(print, **data)
    assert message in str(error.value)
