"""macOS and Windows have no Triton, and lack parts of Python's standard library: what a CPU computes does without."""

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
for module, names in (
    (os, ("pread", "sched_getaffinity", "uname", "killpg", "fork")), (signal, ("SIGUSR1", "SIGKILL")),
):
    for name in names:
        delattr(module, name)
"""
TRAIN = """
from pathlib import Path
from small import small_run
from mm1.engine.display import Silent
from mm1.engine.train import Trainer
from mm1.engine.safety import Stop, locked

folder = Path(sys.argv[1])
with Stop(), locked(folder):
    Trainer(small_run(steps=2, save_every=1), folder, Silent(), False).fit()
print([path.name for path in sorted(folder.iterdir())])
"""
LAUNCH = """
import torch
from mm1.kernels import dispatch
from mm1.kernels.adaptive_pool import _pool_kernel
dispatch.launch(_pool_kernel, 1, torch.zeros(3))
"""


def elsewhere(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", ELSEWHERE + code, *arguments], capture_output=True, text=True)


def test_a_model_trains(tmp_path):
    result = elsewhere(TRAIN, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "step-00000002" in result.stdout
    assert "cannot be locked (this system has no POSIX locks): start no second run in it" in result.stderr


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
