"""Run one of some bad checks, in place of `mm1.bench.contact --run`: contact_checks.py CHECK SKIP FILE."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mm1.bench.checks import Wrong, run_check
from mm1.kernels.fallback import guarded


def right():
    return {"y": 0.0}


def wrong():
    raise Wrong("y by 3")


def failing():
    raise RuntimeError("no kernel image is available")


def dying():
    print("illegal memory access", file=sys.stderr, flush=True)
    os._exit(7)


def hanging():
    time.sleep(600)


def op(name, act):
    """Return an op y = 2x that does `act` where its kernels run."""

    def body(x: Tensor) -> Tensor:
        return act(2 * x)

    return guarded(name, body, lambda x: 2 * x)


def case(*ops):
    def run():
        y = torch.ones(1)
        for one in ops:
            y = one(y)
        if y.item() != 2 ** len(ops):
            raise Wrong(f"y is {y.item()}")
        return {"y": 0.0}

    return run


def slowly(run):
    """Return a case that takes most of the time that a case may take in tests."""
    return lambda: time.sleep(1.2) or run()


def raising(y):
    raise RuntimeError("layout")


def breaking(y):
    """Make all later calls of this process's GPU fail, and show it only at the next synchronization."""

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.synchronize = dead
    return y


sound, other = op("sound", lambda y: y), op("other", lambda y: y)
bad, worse = op("bad", lambda y: y + 1), op("worse", lambda y: y - 1)

CHECKS = {
    "errors": [("a", right), ("b", wrong), ("c", failing), ("d", right)],
    "deaths": [("a", right), ("b", dying), ("c", dying), ("d", right)],
    "hangs": [("a", hanging), ("b", right)],
    "op hangs": [("a", case(op("stuck", lambda y: hanging())))],
    "whole": [("slow", slowly(case(bad, sound, other)))],
    "ops": [
        ("sound", case(sound, other)),
        ("bad", case(sound, bad, other)),
        ("both", case(bad, sound, worse)),
        ("raises", case(op("raises", raising), sound)),
        ("neither", wrong),
        ("breaks", case(sound, op("breaks", breaking), other)),
        ("after", case(sound)),
        ("hangs", case(sound, op("hangs", lambda y: hanging()))),
    ],
}

if __name__ == "__main__":
    check, skip, path = sys.argv[1:]
    run_check(CHECKS[check], int(skip), Path(path), wait=check != "whole")
