"""Measure a machine in one command, the most important results first, within a limit of seconds.

    python -m mm1.bench.run [SECONDS] [--out FOLDER] [--tables FOLDER]

Each step runs in a process of its own, because a faulty kernel may end its process. The record then holds what was
measured before, and the same command continues after it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mm1.bench import generate, kernels, train
from mm1.bench.record import OUT, Record, Row, file, read
from mm1.bench.roofline import DTYPES
from mm1.kernels.attention.backends import gpu_name

ROOT = Path(__file__).parents[2]
STEPS = {"tests": 0.25, "kernels": 0.45, "train": 0.15, "generate": 0.15}  # shares of the time limit
TESTS = ROOT / "tests" / "kernels.txt"  # the tests of kernels, one path per line
BACKENDS = {
    name: name for name in ("flash-attn", "varlen", "xformers", "flex", "sdpa", "triton")
}  # of attention, by peer
BACKENDS["flash-attn 3"] = "flash-attn-3"
LIMIT = 530  # seconds: ten minutes less the time to start


def run(path: Path | None = None, seconds: float = LIMIT, tables: Path | None = None) -> Path:
    """Run the steps that the time allows, and return the path of the record that holds the results.

    path: the record (None: a file in ./bench-results). seconds: total limit. tables: a folder for the measured speeds
    of attention's backends, FOLDER/attention/<gpu>.json; attention's "auto" reads them in mm1/autotune/tables.
    """
    path, end, shares = (path or file()).absolute(), time.monotonic() + seconds, dict(STEPS)
    while shares:
        step, total = next(iter(shares)), sum(shares.values())
        remaining = (end - time.monotonic()) * shares.pop(step) / total
        for _ in range(3):  # if a process dies, the record has its row, and the next process continues after it
            begin = time.monotonic()
            command = [sys.executable, "-m", "mm1.bench.run", "--step", step, str(path), str(remaining)]
            if remaining <= 5 or _process(command, remaining) == 0:
                break
            remaining -= time.monotonic() - begin
    if tables is not None and torch.cuda.is_available():
        _write_backends(read(path), tables)
    return path


def _process(command: list[str], limit: float) -> int:
    """Run a command, and return its status, or 0 if it was ended at the limit."""
    # Strict: what plain torch computes in the place of a kernel must not be measured as the kernel.
    environment = {"MM1_STRICT": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            return 0
        except BaseException:
            process.terminate()
            raise


def _step(step: str, record: Record, seconds: float) -> None:
    """Run one step in this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if step == "tests":
        if not record.has(bench="tests"):
            record.add(_tests(seconds))
    elif step == "kernels":
        kernels.measure(record, seconds=seconds)
    elif step == "train":
        train.measure(record, budget=seconds / 6)
    else:
        generate.measure(record, budget=0.3)


def _tests(seconds: float) -> Row:
    """Run the kernels' tests, on this machine's GPU if it has one, and return their row."""
    if find_spec("pytest") is None or not TESTS.is_file():
        return {"bench": "tests", "failed": {"mm1": "needs pytest and a clone of the repository"}}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS.read_text().split()]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds - 5)
    except subprocess.TimeoutExpired as cut:
        text = (cut.stdout or b"").decode(errors="replace")
        return {"bench": "tests", "cut_off": True, "wrong": text.count("F"), "lines": text.splitlines()[-30:]}
    print(done.stdout[-4000:], flush=True)
    return {"bench": "tests", "status": done.returncode, "lines": done.stdout.splitlines()[-30:]}


def _write_backends(record: dict[str, Any], tables: Path) -> None:
    path = tables / "attention" / f"{gpu_name(None)}.json"
    if speeds := backends(record["rows"], record["header"].get("ceilings", {}).get("gemm", {})):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(speeds, indent=1) + "\n")


def backends(rows: Iterable[Row], peak: dict[str, float]) -> list[dict[str, Any]]:
    """Return the share of peak speed of each attention backend, for the first case of each head width, mask and dtype.

    peak: flop/s by dtype.
    """
    timed: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.get("op") == "attention" and row["mode"] == "stream":
            key = row["shape"]["width"], bool(row["shape"]["causal"]), row["dtype"]
            timed.setdefault(key, {}).setdefault(row["what"], row)
    speeds = []
    for (width, causal, dtype), pair in timed.items():
        forward, both = (pair.get(what, {"variants": {}}) for what in ("forward", "forward+backward"))
        for peer, name in BACKENDS.items():
            if peer in forward["variants"] and peer in both["variants"]:
                seconds = forward["variants"][peer]["median"]
                backward, flops = both["variants"][peer]["median"] - seconds, forward["flops"]
                if backward <= 0:
                    continue  # noise: the two were measured apart
                speeds.append({
                    "head_width": width, "causal": causal, "dtype": str(DTYPES[dtype]).removeprefix("torch."),
                    "backend": name, "forward": flops / seconds / peak[dtype],
                    "backward": (both["flops"] - flops) / backward / peak[dtype],
                })  # fmt: skip
    return speeds


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", nargs="?", type=float, default=LIMIT, help="total limit (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the record (default: ./%(default)s)")
    parser.add_argument("--tables", type=Path, help="folder for speeds of attention's backends (default: none)")
    options = parser.parse_args()
    print(run(file(options.out), options.seconds, options.tables))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:  # a process that `run` started
        _step(sys.argv[2], Record(Path(sys.argv[3])), float(sys.argv[4]))
    else:
        main()
