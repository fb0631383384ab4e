"""Run all benchmarks of a machine in one command, the most important first, within a limit of seconds.

Each step is a separate process, because a wrong kernel can crash it. The record has its measurements by then, and the
same command continues from there.
"""

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
from mm1.bench.record import Record, Row, file
from mm1.bench.roofline import DTYPES
from mm1.kernels.attention.backends import gpu_name

ROOT = Path(__file__).parents[2]
STEPS = {"tests": 0.25, "kernels": 0.45, "train": 0.15, "generate": 0.15}  # shares of the time limit
TESTS = ("clock", "grouped_gemm", "experts", "route", "patch_embed", "conv_block", "adaptive_pool", "flash")
BACKENDS = {"flash-attn": "flash", **{name: name for name in ("varlen", "xformers", "flex", "sdpa", "triton")}}
BACKENDS["flash-attn 3"] = "flash3"
LIMIT = 530  # seconds: ten minutes of a rented machine, less the time to start


def run(path: Path | None = None, seconds: float = LIMIT) -> Path:
    """Run every step that the time allows, add rows to the record at `path`, and return that path.

    seconds: the limit of time for all steps.
    """
    path, end, shares = path or file(), time.monotonic() + seconds, dict(STEPS)
    while shares:
        step, total = next(iter(shares)), sum(shares.values())
        remaining = (end - time.monotonic()) * shares.pop(step) / total
        for _ in range(3):  # a process that crashed in a row has recorded that; the next one continues after it
            begin = time.monotonic()
            command = [sys.executable, "-m", "mm1.bench.run", step, str(path), str(remaining)]
            if remaining <= 5 or _process(command, remaining) == 0:
                break
            remaining -= time.monotonic() - begin
    return path


def _process(command: list[str], limit: float) -> int:
    """Run a command and return its status; at the limit it is terminated, which counts as success."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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
        if torch.cuda.is_available():
            _write_backends(record)
    elif step == "train":
        train.measure(record, budget=seconds / 6)
    else:
        generate.measure(record, budget=0.3)


def _tests(seconds: float) -> Row:
    """Run the kernels' tests, on this machine's GPU if it has one, and return their row."""
    if find_spec("pytest") is None:
        return {"bench": "tests", "failed": {"mm1": "pytest is not installed"}}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    names = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds - 5)
    except subprocess.TimeoutExpired as cut:
        text = (cut.stdout or b"").decode(errors="replace")
        return {"bench": "tests", "cut_off": True, "wrong": text.count("F"), "lines": text.splitlines()[-30:]}
    print(done.stdout[-4000:], flush=True)
    return {"bench": "tests", "status": done.returncode, "lines": done.stdout.splitlines()[-30:]}


def _write_backends(record: Record) -> None:
    """Write the table that attention's "auto" reads."""
    path = ROOT / "mm1" / "autotune" / "tables" / "attention" / f"{gpu_name(None)}.json"
    if table := backends(record.rows, record.header["ceilings"]["gemm"]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")


def backends(rows: Iterable[Row], peak: dict[str, float]) -> list[dict[str, Any]]:
    """Return the shares of the peak that attention's backends reach, for each head width, causality and dtype.

    rows: of a record, of which the first case counts; peak: flop/s by dtype.
    """
    timed: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.get("op") == "attention" and row["mode"] == "stream":
            key = row["shape"]["width"], bool(row["shape"]["causal"]), row["dtype"]
            timed.setdefault(key, {}).setdefault(row["what"], row)
    table = []
    for (width, causal, dtype), pair in timed.items():
        forward, both = (pair.get(what, {"variants": {}}) for what in ("forward", "forward+backward"))
        for peer, name in BACKENDS.items():
            if peer in forward["variants"] and peer in both["variants"]:
                first = forward["variants"][peer]["median"]
                then, flops = both["variants"][peer]["median"] - first, forward["flops"]
                table.append({
                    "head_width": width, "causal": causal, "dtype": str(DTYPES[dtype]).removeprefix("torch."),
                    "backend": name, "forward": flops / first / peak[dtype],
                    "backward": (both["flops"] - flops) / then / peak[dtype],
                })  # fmt: skip
    return table


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        _step(sys.argv[1], Record(Path(sys.argv[2])), float(sys.argv[3]))
    else:
        print(run(seconds=float(sys.argv[1]) if sys.argv[1:] else LIMIT))
