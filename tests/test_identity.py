"""Show that the identity of a run's data tells whether another run would see the same documents."""

import dataclasses
import json
import os
import shutil

import pytest
from small import FOLDER, small_run

from mm1.engine.data.config import Source
from mm1.engine.data.identity import differences, mean_length
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.run_config import Run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"number {i}\n" for i in range(200)))
    shutil.copy(FOLDER / "test-captions.tar.gz", tmp_path)
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    return tmp_path


def run_in(folder, **data) -> Run:
    run = small_run()
    captions = Source("captions", (str(folder / "test-captions.tar.gz"),), 45)
    sources = captions, Source("text", (str(folder / "text.txt"),), 10)
    data = {"sources": sources, "tokenizer": str(folder / "tokenizer.json"), **data}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **data))


def streams(run: Run, before=None):
    return make_streams(run, TextTokenizer(run.data.tokenizer), None, before=before)


def told(run: Run, before: dict) -> list[str]:
    stored = json.loads(json.dumps(before))  # as a checkpoint keeps it
    return differences(stored, streams(run, stored).identity)


def test_data_that_was_moved_or_touched_is_the_same(folder, tmp_path_factory):
    before = streams(run_in(folder)).identity
    moved = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(folder, moved)
    os.utime(moved / "text.txt", (0, 0))
    assert told(run_in(moved), before) == []
    assert str(folder) not in json.dumps(before)


def test_what_changes_no_document_is_no_part_of_it(folder):
    run = run_in(folder)
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=77, accumulate=4, peak_lr=1e-5))
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, workers=2, max_bad=7))
    assert told(other, streams(run).identity) == []


@pytest.mark.parametrize(
    "data, line",
    [
        ({"tokens": 200, "buffer": 640}, "data.tokens: 200, was 160"),
        ({"images": 8}, "data.images: 8, was 16"),
        ({"patches": 256}, "data.patches: 256, was 512"),
        ({"documents": 12}, "data.documents: 12, was 24"),
        ({"buffer": 800}, "data.buffer: 800, was 640"),
        ({"streams": 2}, "data.streams: 2, was 1"),
    ],
)
def test_another_setting_is_named_with_both_values(folder, data, line):
    assert told(run_in(folder, **data), streams(run_in(folder)).identity) == [line]


def test_the_order_of_few_records_is_another_than_in_older_checkpoints(folder):
    """Grain's cipher shuffled them then, as it still shuffles sources of many records."""
    before = streams(run_in(folder)).identity
    assert [name for name in before if name.endswith(".order")] == ["data.sources[1].order"]  # of 200 lines
    del before["data.sources[1].order"]
    assert told(run_in(folder), before) == ["data.sources[1].order: sorted by a hash, was nothing"]


def test_another_seed_and_another_image_policy_are_named(folder):
    run = run_in(folder)
    before = streams(run).identity
    assert told(dataclasses.replace(run, train=dataclasses.replace(run.train, seed=5)), before) == [
        "train.seed: 5, was 0"
    ]
    larger = dataclasses.replace(run, model=dataclasses.replace(run.model, image_patches=100))
    assert told(larger, before) == ["model.image_patches: 100, was 64"]


def test_a_file_with_more_records_is_named_with_both_counts(folder):
    before = streams(run_in(folder)).identity
    with (folder / "text.txt").open("a") as file:
        file.write("one more\n")
    assert told(run_in(folder), before) == ["data.sources[1].files: text.txt (201 records), was text.txt (200 records)"]


def test_a_file_of_other_bytes_is_named_with_both_sizes(folder):
    before, size = streams(run_in(folder)).identity, (folder / "text.txt").stat().st_size
    (folder / "text.txt").write_text((folder / "text.txt").read_text().replace("number 7\n", "number seven\n"))
    (line,) = told(run_in(folder), before)
    assert line == f"data.sources[1].files: text.txt ({size + 4} bytes), was text.txt ({size} bytes)"


def test_a_file_or_source_that_came_or_went_is_named(folder):
    run = run_in(folder)
    before = streams(run).identity
    (folder / "a.txt").write_text("one\n" * 30)
    captions, text = run.data.sources
    more = dataclasses.replace(text, paths=(*text.paths, str(folder / "a.txt")))
    assert told(run_in(folder, sources=(captions, more)), before) == [
        "data.sources[1].files: a.txt (30 records), was 1 files"
    ]
    lines = told(run_in(folder, sources=(captions,)), before)
    assert "data.sources[1].kind: nothing, was text" in lines
    assert "data.sources[1].files: 0 files, was text.txt (200 records)" in lines
    heavier = told(run_in(folder, sources=(captions, dataclasses.replace(text, weight=20))), before)
    assert heavier == ["data.sources[1].weight: 20.0, was 10.0"]


def test_another_tokenizer_of_the_same_size_is_named(folder):
    before = streams(run_in(folder)).identity
    table = json.loads((folder / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (line,) = told(run_in(folder), before)
    assert line.startswith("data.tokenizer: ")


def test_stored_mean_lengths_mix_the_sources_whatever_is_estimated_now(folder):
    """An older version may have estimated other lengths: captions of 1 token, texts of 100."""
    run = run_in(folder)
    estimated = streams(run)
    stored = estimated.identity | {mean_length(0): 1.0, mean_length(1): 100.0}
    resumed, lengths = streams(run, stored), [1.0, 100.0]
    assert resumed.identity == stored
    assert [loader.mixture.mean_lengths for loader in resumed.loaders.values()] == [lengths]

    def captions(batches):
        keys = [key for _ in range(10) for key in next(batches).keys]
        return sum("captions" in key for key in keys) / len(keys)

    # Records are drawn by weight over length: 45 / 1 to 10 / 100.
    assert captions(resumed) > 0.95 > captions(estimated)
