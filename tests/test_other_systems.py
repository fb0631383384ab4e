"""macOS and Windows have no Triton, and lack parts of Python's standard library: what a CPU computes does without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Modules and names that Windows (all) and macOS (triton, sched_getaffinity, /proc) do not have.
ELSEWHERE = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
sys.modules["triton"] = None
import numpy, torch, grain, rich, tokenizers  # which know on what system they are installed
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("pread", "sched_getaffinity", "uname", "killpg", "fork", "geteuid", "setsid"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGKILL"):
    delattr(signal, name)
"""
TRAIN = """
from pathlib import Path
from small import small_run
from mm1.engine.train.display import Silent
from mm1.engine.train.safety import Stop, locked
from mm1.engine.train.trainer import Trainer

folder = Path(sys.argv[1])
with Stop(), locked(folder):
    Trainer(small_run(steps=2, save_every=1), folder, Silent(), False).fit()
print([path.name for path in sorted(folder.iterdir())])
"""
# A module that tasks come from is imported by each process that works on them, before it begins.
TASKS = """
import os, signal
for module, name in ((os, "killpg"), (os, "setsid"), (signal, "SIGKILL")):
    delattr(module, name)

def act(task):
    match task:
        case "exit": os._exit(7)
        case "raise": raise ValueError("not this one")
        case "hang": import time; time.sleep(600)
        case "who": return os.getpid()
    return ["done", task]
"""
WORK = """
import os, signal
from multiprocessing import popen_fork
from types import SimpleNamespace

popen_fork.signal = SimpleNamespace(**vars(signal))  # Python's own kill() needs no signals on Windows
import tasks
from mm1.autotune.workers import Failed, Workers

with Workers(tasks.act, 1, 120.0) as one:
    pid = one.one("who")
    assert [one.one(task) for task in (1, "raise")] == [["done", 1], Failed("ValueError: not this one")]
    assert one.one("who") == pid
    one.limit = 0.5
    assert one.one("hang") == Failed("took longer than 0.5 s", "time")
    assert not os.path.exists(f"/proc/{pid}")
    one.limit = 120.0
    assert one.one("exit") == Failed("the process died with status 7", "process")
    assert one.one(2) == ["done", 2]
print("ended")
"""
LAUNCH = """
import torch
from mm1.kernels import dispatch
from mm1.kernels.abstractor.pooling import _pool_kernel
dispatch.launch(_pool_kernel, 1, x_ptr=torch.zeros(3))
"""


def elsewhere(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", ELSEWHERE + code, *arguments], capture_output=True, text=True)


def test_a_model_trains(tmp_path):
    result = elsewhere(TRAIN, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "step-00000002" in result.stdout
    assert "cannot be locked (this system has no POSIX locks): start no second run in it" in result.stderr


def test_processes_that_crash_or_hang_lose_their_own_task_alone(tmp_path):
    (tmp_path / "tasks.py").write_text(TASKS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, env=environment)
    assert result.stdout == "ended\n", result.stderr


def test_a_kernel_says_what_is_missing():
    result = elsewhere(LAUNCH)
    assert "ImportError: a kernel on a GPU needs Triton, which is not installed: pip install triton" in result.stderr


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["doctor"], 0, "cores"),
        (["explain", "grouped_gemm", "rows=8192", "experts=64", "k=2048", "n=1408", "--device", "h200"], 0, "config"),
        (["tune", "--static"], 2, "mm1: tuning compiles kernels with Triton, which is not installed"),
    ],
)
def test_commands_work_or_say_what_is_missing(arguments, status, said):
    code = "from mm1.cli import main\nsys.argv = ['mm1', *sys.argv[1:]]\nmain()\n"
    result = elsewhere(code, *arguments)
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert " failed: " not in result.stdout
