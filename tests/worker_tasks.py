"""Define tasks for other processes, in a module without torch, so that a process starts at once."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

BROKEN: list[str] = []  # what every further task of this process says, as CUDA does after an error of a kernel


class OutOfMemoryError(RuntimeError):
    """Stand for torch's error of this name."""


def act(task: Any) -> Any:
    if BROKEN:
        raise RuntimeError(BROKEN[0])
    match task:
        case "illegal":
            BROKEN.append("CUDA error: an illegal memory access was encountered")
            raise RuntimeError(BROKEN[0])
        case ("late", number):
            BROKEN.append("CUDA error: unspecified launch failure")
            return ["done", number]
        case "short":
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case ("lost", path) if Path(path).exists():
            raise RuntimeError("No CUDA GPUs are available")
        case ("lost", _):
            return ["done", 8]
        case ("loses", path):
            Path(path).touch()
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        case "raise":
            raise ValueError("not   this\none")
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "who":
            return os.getpid()
        case ("leave" | "hang", path):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(path).write_text(str(child.pid))
            if task[0] == "hang":
                time.sleep(600)
    return ["done", task]


@dataclass(frozen=True)
class Job:
    """Stand for a configuration."""

    task: Any


class Trial(NamedTuple):
    """Stand for mm1.autotune.timing.Trial."""

    kernel: str
    shape: tuple[Any, ...]
    bits: int
    configs: tuple[Job, ...]
    samples: int


def act_on_each(trial: Trial) -> list[Any]:
    return [[float(act(job.task)[1])] * trial.samples for job in trial.configs]
