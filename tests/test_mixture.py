"""Show the order of a source's records, and which of several captions an epoch uses."""

import dataclasses
import io
import json
import pickle
import tarfile

import grain
import numpy as np
import pytest
from PIL import Image
from small import FOLDER, IMAGE, PATCH, SLOTS, small_run

from mm1.engine.data.config import Source
from mm1.engine.data.document import Budget, DocumentEncoder, Unit
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture, shuffled
from mm1.engine.data.packing import Loader
from mm1.engine.data.record import SMALL_SOURCE, Alternatives, Record
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.data.tokenizer import texts_of

TOKENIZER = TextTokenizer(FOLDER / "tokenizer.json")
BUDGET = Budget(60, 4, 400, 8)
ENCODE = DocumentEncoder(TOKENIZER, ImagePolicy(PATCH, "native", 24, 64), SLOTS, BUDGET)


class Records:
    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return Record((self.records[i],), str(i), "shard")


def texts(mixture, positions):
    return [TOKENIZER.decode(mixture[i].documents[0].tokens.tolist()) for i in positions]


@pytest.mark.parametrize("records", [1, 2, 3, 4, 100, SMALL_SOURCE - 1, SMALL_SOURCE, SMALL_SOURCE + 1])
def test_every_pass_has_each_record_once(records):
    for passed in range(3):
        assert sorted(shuffled(i, records, 7, passed) for i in range(records)) == list(range(records))


@pytest.mark.parametrize("records", [4, 100, SMALL_SOURCE - 1, SMALL_SOURCE, 5000])
def test_passes_and_seeds_have_orders_of_their_own(records):
    def order(seed, passed):
        return [shuffled(i, records, seed, passed) for i in range(min(records, 50))]

    orders = [order(seed, passed) for seed in (0, 50, 2**31) for passed in range(10)]
    assert len({tuple(order) for order in orders}) > (15 if records == 4 else 29)
    assert order(5, 3) == order(5, 3)


def test_every_order_of_few_records_comes_as_often():
    counts = {}
    for passed in range(6000):
        order = tuple(shuffled(i, 3, 0, passed) for i in range(3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 130  # more than four standard deviations


@pytest.mark.parametrize("records", [SMALL_SOURCE, 5000])
def test_many_records_keep_the_order_of_grains_shuffle(records):
    seed = 2**32 - 2
    truth = grain.MapDataset.range(records).shuffle(seed=seed).repeat()
    places = [*range(0, 2 * records, 97), 3 * records + 5]
    assert [shuffled(i % records, records, seed, i // records) for i in places] == [truth[i] for i in places]


def test_a_cut_document_is_a_linear_number_of_copies():
    """Only the tokens of a piece are copied, not the rest of the text."""

    class Ids(list):
        copied = 0

        def __getitem__(self, part):
            ids = super().__getitem__(part)
            Ids.copied += len(ids)
            return ids

    ids = Ids([5] * 20_000)
    ENCODE.cut([Unit([1], []), Unit(ids, []), Unit([2], [])], Record(("x",), "0", "s"))
    assert Ids.copied == 20_000


CAPTIONS = ("one", "two two", "three three three")


def test_a_pass_has_one_of_several_captions_and_as_many_passes_all():
    mixture = Mixture([Records(*(Alternatives(CAPTIONS) for _ in range(12)))], [1.0], ENCODE, 5)
    keys = [[mixture[12 * n + i].key for i in range(12)] for n in range(3)]
    drawn = [dict(zip(keys[n], texts(mixture, range(12 * n, 12 * n + 12)))) for n in range(3)]
    for record in map(str, range(12)):
        assert {drawn[n][record] for n in range(3)} == set(CAPTIONS)
    assert len(set(drawn[0].values())) == 3, "records do not all begin with the first"


def test_the_caption_depends_on_seed_pass_and_record_alone():
    def drawn(seed, number=40):
        mixture = Mixture([Records(*(Alternatives(CAPTIONS) for _ in range(20)))], [1.0], ENCODE, seed)
        return {(mixture[i].key, i // 20): texts(mixture, [i])[0] for i in range(number)}

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert {k: v for k, v in drawn(3).items() if k[1] == 0} == drawn(3, 20)


def test_a_choice_is_its_first_text_and_survives_pickling():
    choice = pickle.loads(pickle.dumps(Alternatives(CAPTIONS)))
    assert (choice, type(choice), choice.texts) == ("one", Alternatives, CAPTIONS)


@pytest.fixture
def captions(tmp_path):
    """Write a tar of images with three captions each."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(30):
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(image, "PNG")
            captions = {"caption": [f"{name} {i}" for name in CAPTIONS]}
            for ending, content in (("png", image.getvalue()), ("json", json.dumps(captions).encode())):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(tmp_path / "a.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_drawn_are_part_of_the_exact_resume(captions, workers):
    run = small_run()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=(Source("captions", (captions,)),)))

    def loader(workers=0) -> Loader:
        data = dataclasses.replace(run.data, workers=workers)
        return make_streams(dataclasses.replace(run, data=data), TOKENIZER, None).loaders[0]

    first = loader()
    for _ in range(6):  # more than a pass
        next(first)
    state, truth = json.loads(json.dumps(first.state())), [next(first) for _ in range(4)]
    resumed = loader(workers)
    resumed.restore(state)
    for expected in truth:
        batch = next(resumed)
        assert batch.keys == expected.keys
        assert batch.tokens.equal(expected.tokens)
    assert len({tuple(batch.tokens.tolist()) for batch in truth}) == 4
    assert IMAGE in truth[0].tokens.tolist()


def test_a_tokenizer_learns_all_captions(captions):
    assert sorted(texts_of([captions])) == sorted(f"{name} {i}" for name in CAPTIONS for i in range(30))
