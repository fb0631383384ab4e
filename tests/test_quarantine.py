"""Show that bad records are listed once, across epochs and resumes, also in files damaged by kills or users."""

import json
from pathlib import Path

import pytest

from mm1.engine.data.lines import Appended, read_lines
from mm1.engine.data.quarantine import Quarantine

GARBAGE = {
    "torn": b'{"shard": "a.tar", "key": "7", "rea',
    "binary": bytes(range(256)),
    "no object": b'["a.tar", "7"]',
    "another object": b'{"step": 3, "loss": 1.5}',
    "wrong types": b'{"shard": "a.tar", "key": 7, "reason": null, "position": "3"}',
    "deep": b"[" * 100_000,
}


def listing(folder, rank=0):
    """List what a process draws: the records 0 to 9 of three streams twice, every other one bad."""
    quarantine = Quarantine(folder, rank)
    for position in range(20):
        key = position % 10
        if key % 2:
            quarantine.add("a.tar", str(key), "broken", position)
    return quarantine


def keys_of(folder, rank=0):
    path = folder / f"rank-{rank:05d}.jsonl"
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_record_is_listed_once_not_once_an_epoch_also_after_a_resume(tmp_path):
    listing(tmp_path)
    assert keys_of(tmp_path) == ["1", "3", "5", "7", "9"]
    listing(tmp_path)  # another process, whose memory is the file
    assert keys_of(tmp_path) == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["unfinished", "finished"])
def test_lines_that_are_none_are_dropped_with_a_warning_and_the_others_stay(tmp_path, garbage, end):
    listing(tmp_path)
    path = tmp_path / "rank-00000.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + garbage.replace(b"\n", b" ") + b"\n" + b"".join(rest) + garbage.replace(b"\n", b" ") + end)
    quarantine = Quarantine(tmp_path)
    (warning,) = quarantine.trim({0: 100})
    assert "rank-00000.jsonl: 2 lines" in warning
    assert path.read_bytes() == first + b"".join(rest)
    assert quarantine.trim({0: 100}) == []
    listing(tmp_path)
    assert keys_of(tmp_path) == ["1", "3", "5", "7", "9"]


def test_a_torn_last_line_does_not_swallow_what_is_listed_next(tmp_path):
    """A process that is killed during a write leaves such a line, in a new or resumed run."""
    listing(tmp_path)
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # all but the line's end was written
    quarantine = Quarantine(tmp_path)
    assert quarantine.trim({0: 100}) == []
    quarantine.add("b.tar", "1", "broken", 50)
    assert keys_of(tmp_path) == ["1", "3", "5", "7", "9", "1"]


def test_trimming_drops_what_each_stream_had_not_reached_in_the_files_of_all_processes(tmp_path):
    for rank in (0, 1):
        listing(tmp_path, rank)
    Quarantine(tmp_path).add("cut.tar", "", "cut off", -1)  # damage is detected again whenever files are indexed
    quarantine = Quarantine(tmp_path)
    quarantine.trim({0: 9, 1: 4, 2: 5})  # positions 3 and 9 are of stream 0, 1 and 7 of 1, 5 of 2
    assert keys_of(tmp_path, 0) == keys_of(tmp_path, 1) == ["1", "3"]
    quarantine.add("a.tar", "7", "broken", 7)
    assert keys_of(tmp_path, 0) == ["1", "3", "7"]
    quarantine.trim({})  # a run that begins
    assert keys_of(tmp_path, 0) == keys_of(tmp_path, 1) == []


def test_the_summary_counts_different_records_of_all_processes_by_reason(tmp_path):
    for rank in (0, 1):
        listing(tmp_path, rank).add(f"{rank}.tar", "x", "empty caption", 99)
    Quarantine(tmp_path).add("cut.tar", "", "cut off", -1)
    assert list(Quarantine(tmp_path).summary().items()) == [("broken", 5), ("empty caption", 2)]
    assert Quarantine(tmp_path / "none").summary() == Quarantine(None).summary() == {}


def test_names_of_any_characters_are_listed_as_they_are(tmp_path):
    names = ["é/日本", "a\nb", '"', "\udcff", "line\u2028separator"]
    quarantine = Quarantine(tmp_path)
    for name in names:
        quarantine.add(name, name, name, 0)
    quarantine.trim({0: 1})
    assert [(r["shard"], r["key"], r["reason"]) for r in Quarantine(tmp_path).records()] == [(n, n, n) for n in names]


def test_read_lines_takes_what_it_can_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == ([], 0)
    path.write_bytes(b'{"step": 1}\n\n  \n{"step": NaN}\n{"step": 2}\r\n' + b"\xff\xfe\n" + b'{"step": 3')
    lines, bad = read_lines(path)
    assert [line["step"] for line in lines if line["step"] == line["step"]] == [1, 2]
    assert (len(lines), bad) == (3, 2)


def test_lines_that_a_full_disk_refuses_are_written_later_and_what_was_torn_costs_none(tmp_path, monkeypatch):
    path, refused = tmp_path / "lines.jsonl", []
    file = Appended(path)
    file.add({"step": 1})
    real = Path.open

    def full(self, *args, **kwargs):
        with real(self, "a") as torn:
            torn.write('{"step": 2, "lo')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        refused += [file.add({"step": 2}), file.add({"step": 3})]
    file.add({"step": 4})
    assert refused[0].endswith("No space left on device; its lines are kept and written later")
    assert refused[1] is None  # told once
    assert [line["step"] for line in read_lines(path)[0]] == [1, 2, 3, 4]
