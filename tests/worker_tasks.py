"""What tests give to other processes to do: functions of a module, and no torch, so that a process starts at once."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


def act(task: Any) -> Any:
    match task:
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
    """As a configuration is."""

    task: Any


class Trial(NamedTuple):
    """As mm1.autotune.timing's is."""

    kernel: str
    shape: tuple[Any, ...]
    bits: int
    configs: tuple[Job, ...]
    samples: int


def act_on_each(trial: Trial) -> list[Any]:
    return [[float(act(job.task)[1])] * trial.samples for job in trial.configs]
