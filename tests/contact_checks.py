"""Run one of three bad checks, in place of `mm1.bench.contact --run`: contact_checks.py CHECK SKIP FILE."""

import os
import sys
import time
from pathlib import Path

from mm1.bench.contact import Wrong, run_check


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


CHECKS = {
    "errors": [("a", right), ("b", wrong), ("c", failing), ("d", right)],
    "deaths": [("a", right), ("b", dying), ("c", dying), ("d", right)],
    "hangs": [("a", hanging), ("b", right)],
}

if __name__ == "__main__":
    check, skip, path = sys.argv[1:]
    run_check(CHECKS[check], int(skip), Path(path))
