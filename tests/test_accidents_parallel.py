"""What a run on several processes survives, over gloo under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import accident_runs
import pytest

from mm1.engine.data.lines import read_lines
from mm1.engine.train import checkpoint
from mm1.engine.train.replay import replay


class Launched:
    """accident_runs.py under torchrun; standard error goes to a file."""

    def __init__(self, what: str, folder: Path, *more: str, processes: int = 2, options: tuple[str, ...] = ()):
        self.folder, self.errors = folder, folder.with_name(f"{what}-errors.txt")
        folder.parent.mkdir(parents=True, exist_ok=True)
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        command = [*torchrun, *options, accident_runs.__file__, what, str(folder), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(command, env=environment, stderr=self.errors.open("w"))
        self.pids = [folder.with_name(f"pid-{rank}") for rank in range(processes)]

    def lines(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return read_lines(path)[0]

    def wait_for(self, seen) -> None:
        deadline = time.monotonic() + 240
        while not seen():
            assert self.popen.poll() is None, self.errors.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def pid(self, rank: int) -> int:
        return int(self.pids[rank].read_text())

    def end(self) -> int:
        """Wait for torchrun and for its processes, which may outlive it; returns torchrun's status."""
        status = self.popen.wait(240)
        deadline = time.monotonic() + 120
        for path in self.pids if self.pids[0].exists() else ():
            while running(int(path.read_text())):
                assert time.monotonic() < deadline, f"{path.name} was left behind"
                time.sleep(0.01)
        return status


def running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_checkpoint_is_whole_before_the_next_save_and_a_killed_rank_loses_nothing_of_it(tmp_path):
    launched = Launched("train", tmp_path / "run")
    launched.wait_for(lambda: checkpoint.latest(launched.folder) is not None)
    newest = checkpoint.latest(launched.folder)
    assert newest.name == "step-00000030"
    assert 30 <= len(launched.lines()) < 60
    os.kill(launched.pid(1), signal.SIGKILL)
    assert launched.end() != 0
    checkpoint.check(newest)
    again = Launched("train", tmp_path / "run")
    again.wait_for(lambda: "resumed at step 30" in again.errors.read_text())
    again.popen.send_signal(signal.SIGTERM)  # torchrun passes it on
    again.end()


PASSED_ON = ("--shutdown-timeout=600", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # README's
SENT = {"SIGTERM to torchrun": (), "SIGUSR1 to torchrun": (), "SIGUSR1 to torchrun, passed on": PASSED_ON,
        "SIGUSR1 to one": (), "SIGTERM to all": ()}  # fmt: skip


@pytest.mark.parametrize("sent", SENT)
def test_a_signal_makes_all_processes_save_once_and_leaves_none_behind(sent, tmp_path):
    launched = Launched("train", tmp_path / "run", options=SENT[sent])
    launched.wait_for(lambda: len(launched.lines()) >= 3)
    if "torchrun" in sent:
        launched.popen.send_signal(signal.Signals[sent.split()[0]])
    elif sent == "SIGUSR1 to one":
        os.kill(launched.pid(1), signal.SIGUSR1)
    else:  # as a scheduler does, to each process and to torchrun, which passes another one on
        for pid in (launched.pid(0), launched.pid(1), launched.popen.pid):
            os.kill(pid, signal.SIGTERM)
    assert launched.end() != 0
    newest = checkpoint.latest(launched.folder)
    assert newest is not None, launched.errors.read_text()[-3000:]
    checkpoint.check(newest)
    steps = [line["step"] for line in launched.lines()]
    assert steps == list(range(1, checkpoint.read_json(newest, "state.json")["step"] + 1))
    assert not list(launched.folder.glob(".step-*"))
    if sent == "SIGUSR1 to one":
        assert "exitcode  : 143" in launched.errors.read_text()


def test_a_full_disk_of_two_processes_is_tried_again_by_all_and_no_metric_is_lost(tmp_path):
    launched = Launched("full", tmp_path / "run", processes=4)
    assert launched.end() == 0, launched.errors.read_text()[-3000:]
    steps = [path.name for path in checkpoint.numbered(launched.folder)]
    assert steps == ["step-00000012", "step-00000016"]
    assert not list(launched.folder.glob(".step-*"))
    assert [line["step"] for line in launched.lines()] == list(range(1, 17))
    errors = launched.errors.read_text()
    assert "metrics.jsonl: File too large; its lines are kept and written later" in errors
    assert "step-00000008 was not written" in errors
    assert "File too large" in errors
    assert "Traceback" not in errors
    for folder in checkpoint.numbered(launched.folder):
        checkpoint.check(folder)


def test_an_error_that_ends_a_run_waits_for_the_active_save(tmp_path):
    launched = Launched("error", tmp_path / "run")
    assert launched.end() == 1
    assert "the data ended" in launched.errors.read_text()
    assert checkpoint.latest(launched.folder).name == "step-00000004"
    checkpoint.check(launched.folder / "checkpoint")


def test_a_run_of_two_processes_is_replayed_on_two_to_the_bit_and_on_one_to_rounding(tmp_path):
    assert Launched("one", tmp_path / "run").end() == 0
    folder = tmp_path / "run"
    for processes in (1, 2):
        if processes == 2:
            assert Launched("replay", folder, "10").end() == 0
        report = replay(folder, 10) if processes == 1 else json.loads((tmp_path / "replay-2.json").read_text())
        assert report["from"] == "step-00000008"
        assert report["same_layout"] == (processes == 2)
        assert report["verdict"] == ["nothing differs"]
        assert len(report["documents"]) == 5
        assert report["again"]["loss"] == pytest.approx(report["recorded"]["loss"], rel=1e-6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[9]["loss"] *= 1.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (verdict,) = replay(folder, 10)["verdict"]
    assert verdict.startswith("layout: step 10 differs from the recorded result")
    assert "the run had 2 processes on cpu" in verdict
    assert Launched("replay", folder, "10").end() == 0
    report = json.loads((tmp_path / "replay-2.json").read_text())
    assert report["verdict"] == ["hardware or software: step 10 differs from the recorded result"]
