"""`mm1 tune` writes tables and rows that read as written, reports clearly, and tunes many processes alike."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mm1 import cli
from mm1.autotune import predict, tune
from mm1.autotune.explain import explain
from mm1.autotune.ranks import expect_consistent, group, on_all_ranks, on_rank_0
from mm1.autotune.space import KERNELS
from mm1.autotune.tables import merged, read_table, without, write_table, write_user_row
from mm1.kernels import tuning
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import TuneError
from tests.conftest import not_interpreted
from tests.toy_kernel import (
    HERE,
    KERNEL,
    TOY,
    Gpu,
    answer,
    isolated,
    source,
)

pytestmark = not_interpreted
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    """Give each test its own cache and tables, the toy kernel, and a GPU of a kind of its own."""
    yield from isolated(tmp_path, monkeypatch)


# --- tables ---


def test_neighbouring_intervals_are_one_row_only_where_all_else_is_equal():
    rows = [source([129, 256], 16), source([65, 128], 16), source([257, 512], 32), source([513, 1024], 32, "measured"),
            source([1025, 2048], 32, "measured"), source([4097, 8192], 32), source([1 << 14, 1 << 15], 32),
            source([1, 64], 16, width=32),
            source([65, 128], 16, width=32), source([33, 64], 16)]  # fmt: skip
    found = [(r["when"]["width"], r["when"]["rows"], r["config"]["block"], r["origin"]) for r in merged(rows)]
    assert found == [
        (32, [1, 128], 16, "predicted"),
        (64, [33, 256], 16, "predicted"),
        (64, [257, 512], 32, "predicted"),
        (64, [513, 1024], 32, "measured"),
        (64, [1025, 2048], 32, "measured"),
        (64, [4097, 8192], 32, "predicted"),
        (64, [1 << 14, 1 << 15], 32, "predicted"),
    ]
    other = source([257, 512], 16)
    other["when"]["bits"] = 32
    assert len(merged([source([129, 256], 16), other])) == 2


def test_predicted_rows_are_cut_around_a_measured_one():
    def cut(*intervals, new=(129, 256)):
        rows = [source(list(interval), 16) for interval in intervals]
        return [tuple(r["when"]["rows"]) for r in without(rows, source(list(new), 32, "measured"))]

    assert cut((1, 4096)) == [(1, 128), (257, 4096)]
    assert cut((1, 128), (129, 256), (257, 512)) == [(1, 128), (257, 512)]
    assert cut((1, 129), (256, 300), (150, 200)) == [(1, 128), (257, 300)]
    kept = [source([1, 4096], 16, "measured"), source([1, 4096], 16, width=32)]
    assert without(kept, source([129, 256], 32, "measured")) == kept


def test_a_table_reads_as_it_was_written_one_row_a_line(tmp_path):
    rows = [source([129, 256], 16), source([65, 128], 32), source([65, 128], 32, width=32)]
    path = write_table(tmp_path, "toy", DEVICES["h200"], rows)
    first = path.read_bytes()
    back = read_table(tmp_path, "toy", DEVICES["h200"])
    assert back == [rows[2], rows[1], rows[0]]
    head, *lines, tail = first.decode().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines] == back
    assert json.loads(head + tail)["device"]["pci"] == ["2335", "233b"]
    write_table(tmp_path, "toy", DEVICES["h200"], rows[::-1])
    assert path.read_bytes() == first
    assert read_table(tmp_path, "toy", DEVICES["a100"]) == []


def _write_often(start, block):
    start.wait()
    for _ in range(100):
        write_user_row(TOY, HERE, source([65, 128], block, "measured", note="x" * 5000))


def test_two_who_write_the_same_row_at_once_leave_one_that_is_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    writers = [context.Process(target=_write_often, args=(start, block)) for block in (16, 32)]
    for writer in writers:
        writer.start()
    start.wait()
    folder, seen = tmp_path / "cache/configs/toy/made-up", 0
    while any(writer.is_alive() for writer in writers) or not seen:
        for path in folder.glob("*.json"):
            assert json.loads(path.read_text())["config"]["block"] in (16, 32)
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(folder.iterdir())) == 1
    tuning.clear_caches()
    assert answer()[0] == "user"


def test_threads_that_write_the_same_row_are_not_in_each_others_way(tmp_path, monkeypatch):
    real = os.replace

    def meanwhile(part, path):
        monkeypatch.setattr(os, "replace", real)
        write_user_row(TOY, HERE, source([65, 128], 16, "measured"))
        real(part, path)

    monkeypatch.setattr(os, "replace", meanwhile)
    path = write_user_row(TOY, HERE, source([65, 128], 32, "measured"))
    assert json.loads(path.read_text())["config"]["block"] == 32
    assert list(path.parent.iterdir()) == [path]


def test_no_row_that_its_kernel_could_not_read_is_written(tmp_path):
    for bad in (source(["a", "b"], 16), {**source([1, 2], 16), "config": {"blocks": 16}}, {"when": {}}):
        with pytest.raises(ValueError, match="is not a row of"):
            write_user_row(TOY, HERE, bad)
    assert not (tmp_path / "cache").exists()


def test_a_write_that_fails_leaves_nothing_else(tmp_path):
    path = tmp_path / "toy" / "h200.json"
    path.mkdir(parents=True)  # no file can take its place
    with pytest.raises(OSError):
        write_table(tmp_path, "toy", DEVICES["h200"], [])
    assert list(path.parent.iterdir()) == [path]


def test_tables_can_be_read_by_others_as_any_file_can(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert write_table(tmp_path, "toy", HERE, []).stat().st_mode == plain.stat().st_mode


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tune, "Workers", lambda function, count, limit: Gpu())
    status, error = told(monkeypatch, capsys, "tune", "toy", "--budget", "60")
    assert status == 1
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "no folder"


# --- what is told ---


def test_the_check_names_a_table_that_cannot_be_read(tmp_path):
    path = write_table(tmp_path, "toy", DEVICES["h200"], [source([1, 2], 32)])
    path.write_text(path.read_text()[:-9])
    assert "toy/h200.json" in predict.check(["toy"], [DEVICES["h200"]], tmp_path, processes=1)[0]


def test_the_command_checks_a_folder_of_tables(tmp_path, monkeypatch, capsys):
    write_table(tmp_path, "toy", DEVICES["h200"], [source([1, 2], 128)])
    monkeypatch.setattr(sys, "argv", ["mm1", "tune", "toy", "--check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    *faults, last = capsys.readouterr().out.splitlines()
    assert (ended.value.code, json.loads(last)) == (1, {"faults": 1})
    assert "Config(block=128) is not legal on h200" in faults[0]


def mm1(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "mm1.cli", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **environment})  # fmt: skip


def told(monkeypatch, capsys, *arguments):
    """Return the exit status and the one line of standard error."""
    monkeypatch.setattr(sys, "argv", ["mm1", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mm1: ")
    return ended.value.code, lines[0]


BAD = {
    "tune nosuch": "unknown kernel 'nosuch'",
    "tune toy --shape rows=1": "missing 'width'",
    "tune toy --shape width=1,rows=two": "whole numbers",
    "tune toy --static": "--device",
    "tune toy --device h200": "--static or --check",
    "tune toy --static --device h200 --processes 0": "--processes is 0, expected at least 1",
    "tune toy --static --device h2000": "unknown device 'h2000'",
    "tune --check --device h2000": "unknown device 'h2000'",
    "explain nosuch rows=1 --device h200": "unknown kernel 'nosuch'",
    "explain toy rows=1 --device h200": "missing 'width'",
    "explain toy rows=1 width=1 wdith=2 --device h200": "unknown 'wdith'",
    "explain toy rows=1 width= --device h200": "whole numbers",
    "explain toy rows=1 width=1": "--device",
    "explain toy rows=1 width=1 --device h2000": "known: a100",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_status_2_and_one_line_that_says_what(monkeypatch, capsys, command):
    status, error = told(monkeypatch, capsys, *command.split())
    assert status == 2
    assert BAD[command] in error


@pytest.mark.parametrize("shape", ["rows=-4 width=64", "rows=4 width=64 gated=perhaps", "rows=4 rows=5 width=64"])
def test_a_shape_that_cannot_be_is_refused(monkeypatch, capsys, shape):
    assert told(monkeypatch, capsys, "explain", "toy", *shape.split(), "--device", "h200")[0] == 2


def test_a_table_is_not_emptied_for_want_of_processes(tmp_path):
    path = write_table(tmp_path, "toy", DEVICES["h200"], [source([65, 128], 32)])
    before = path.read_bytes()
    with contextlib.suppress(ValueError):
        predict.predict(["toy"], DEVICES["h200"], tmp_path, processes=0)
    assert path.read_bytes() == before


def test_the_command_itself_ends_with_that_status_and_line():
    run = mm1("explain", "grouped_gemm", "rows=8192", "--device", "h200")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "mm1: grouped_gemm: missing 'experts' in the shape; it takes rows, experts, k, n, gated\n"


def test_without_a_gpu_measuring_says_what_can_be_done_instead(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(TuneError, match="--static --device NAME"):
        tune.tune(["grouped_gemm"], 1.0)


def test_explain_marks_the_step_that_answers_and_says_why_others_did_not(tmp_path, capsys):
    write_table(tmp_path / "tables", "toy", DEVICES["h200"], [source([65, 128], 32)])
    capsys.readouterr()
    found = explain("toy", "rows=200,width=64", "h200")
    assert (found["step"], found["config"], found["origin"]) == ("neighbour", {"block": 32}, "predicted")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("→")] == ["neighbour"]
    assert "shipped    none of 1 usable rows in h200.json holds the shape" in lines[3]
    assert "block=32" in lines


def test_a_row_says_at_which_clocks_it_was_measured(capsys, monkeypatch):
    state = {"sm_mhz": 1980, "memory_mhz": 3201}
    monkeypatch.setattr(tune.gpu_state, "read", lambda index: state)
    tune._print_head(HERE, 60.0)
    assert "1980/3201 MHz" in capsys.readouterr().out


def test_interpreted_the_whole_of_it_runs(tmp_path):
    log = tmp_path / "log.jsonl"
    run = mm1("tune", "conv_norm", "--shape", "rows=2 channels=16", "--budget", "60", "--log", str(log),
              TRITON_INTERPRET="1", MM1_CACHE=str(tmp_path))  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert (found["device"], found["shapes"]) == ("interpreted", 1)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events[0] == "samples"
    assert "refused" not in events


# --- many processes ---


def as_rank() -> None:
    """Run in each of two processes: tune, then with other rows, then with an error on one rank."""
    rank, found = int(os.environ["RANK"]), {}
    KERNELS["toy"] = KERNEL
    tune.this_device = lambda: HERE
    tune.Workers = lambda *_: Gpu() if rank == 0 else None
    with group(120) as ranks:
        result = tune.tune(["toy"], 60.0)
        found |= {"rows": result["rows"], "digest": result["digest"], "answer": answer()}
        if rank == 1:
            for path in (tuning.cache_folder() / "toy" / HERE.name).iterdir():  # as another process would
                path.write_text(path.read_text().replace('"block": 32', '"block": 16'))
        try:
            expect_consistent([TOY], HERE, ranks)
        except TuneError as error:
            found["differ"] = str(error)

        def fail():
            raise TuneError(f"said by rank {rank}")

        try:
            on_rank_0(fail, ranks)
        except TuneError as error:
            found["error"] = str(error)
        try:
            on_all_ranks(fail if rank else lambda: None, ranks)
        except TuneError as error:
            found["elsewhere"] = str(error)
        found["again"] = on_rank_0(lambda: rank, ranks)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        cache = str(tmp_path_factory.mktemp(f"rank{rank}"))
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "MM1_CACHE": cache, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        ranks.append(subprocess.Popen([sys.executable, "-c", "from tests.test_tune_tables import as_rank; as_rank()"],
                                      cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True))  # fmt: skip
    found = []
    for process in ranks:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_every_rank_has_the_rows_of_rank_0(two_ranks):
    first, second = two_ranks
    assert len(first["rows"]) == 3
    assert first["rows"] == second["rows"]
    assert first["digest"] == second["digest"]
    assert first["answer"] == second["answer"] == ["user", 32]


def test_a_rank_with_other_rows_is_named(two_ranks):
    for found in two_ranks:
        assert found["differ"].startswith("ranks [1] have other configurations than rank 0")


def test_an_error_on_rank_0_is_one_on_every_rank(two_ranks):
    assert [found["error"] for found in two_ranks] == ["rank 0: TuneError: said by rank 0"] * 2
    assert [found["elsewhere"] for found in two_ranks] == ["rank 1: TuneError: said by rank 1"] * 2
    assert [found["again"] for found in two_ranks] == [0, 0]
