"""Check this project on a GPU on which it has never run: each op against its reference, then graphs and whole steps.

    python -m mm1.bench.contact [--out FOLDER] [--seconds 240] [--jobs 8] [CHECK …]

It needs torch, triton and numpy, and no other package. Each check runs in a process of its own, several at once, which
also spreads the compilation of kernels over the processor's cores. A case that fails, dies or hangs costs that case
alone: the check continues with the next one. All results go into one record, failures with their tracebacks.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.autotune.space import Inputs
from mm1.bench.kernels import TOLERANCE, WIDE, rms, rms_error
from mm1.bench.ops import OPS, Problem, calls
from mm1.bench.record import OUT, Record, machine_name
from mm1.bench.roofline import DTYPES
from mm1.kernels.attention import Causal, Full, Prefix, attention
from mm1.kernels.attention.backends import BACKENDS, installed
from mm1.kernels.attention.masks import Mask
from mm1.kernels.attention.reference import attention as attention_reference
from mm1.kernels.dispatch import Cost
from mm1.kernels.language import INTERPRETED

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "mm1.bench.contact", "--run")
PAUSE = 0.2  # seconds between two looks at the processes
PATIENCE = {"cuda": 120.0, "cpu": 600.0}  # seconds that a case may take, compilation included
START = 300.0  # seconds that a process may take to begin its first case
# Beside each op's first case of a GPU: the smallest sizes, and ragged ones.
SMALL: dict[str, list[tuple[Any, ...]]] = {
    "moe_mlp": [("fine", 1), ("fine", 0), ("fine", 77), ("coarse", 130, "one")],
    "patch_embed": [("tiny", 3, 64, 2), ("tiny", 3, 128), ("tiny", 3, 128, 16)],
    "embed_patches": [("tiny", 3, 64, 2), ("tiny", 3, 128)],
    "qwen_embed": [("tiny", 3, 64, 2)],
    "conv_block": [("tiny", 3, 64), ("mixed", 2, 128)],
    "adaptive_pool": [("tiny", 3, 64), ("mixed", 2, 128)],
    "c_abstractor": [("tiny", 3, 64)],
    "grouped_gemm": [(1, 4, 64, 64), (100, 8, 72, 200)],
    "attention": [(1, 1, 2, 2, 64, True), (3, 37, 4, 2, 80, True), (2, 130, 4, 4, 80, False), (2, 70, 4, 1, 128, True)],
    "paged_attention": [(1, 1, 1, 2, 1, 64), (3, 1, 70, 4, 2, 128)],
    "route": [(1, 4, 1), (77, 8, 2), (33, 512, 8)],
    "linear_cross_entropy": [(1, 64, 10), (33, 72, 1000)],
}
MASKS: dict[str, Callable[[str], Mask]] = {
    "full": lambda device: Full(), "causal": lambda device: Causal(),
    "prefix": lambda device: Prefix(torch.tensor([0, 20, 5, 200], device=device, dtype=torch.int32)),
}  # fmt: skip
LARGE = {"moe_mlp": "olmoe T=8192"}  # where the first case fills a GPU that other checks share
ZERO = 1e-6  # of the largest rms: a smaller result is zero but for rounding

# A case returns errors by name, relative to the rms of the truth, and raises where one is too large.
Case = Callable[[], dict[str, float]]


class Wrong(Exception):
    """Raised by a case whose results are too far from the reference's."""


class Context(NamedTuple):
    """Say where cases run."""

    device: str  # "cuda", "cuda:1" or "cpu"
    dtypes: tuple[str, ...]

    @property
    def large(self) -> bool:
        """Return whether cases may have the sizes of a GPU."""
        return self.device == "cuda"


# ---- The checks: a table of functions that make cases by name, in the order in which they run ----


def op_cases(op: str, on: Context) -> Iterator[tuple[str, Case]]:
    """Yield an op's cases: each size in each dtype, forward and, if the op has one, backward."""
    for args in SMALL[op]:
        for dtype in on.dtypes:
            yield f"{' '.join(map(str, args))} {dtype}", partial(compare, op, args, DTYPES[dtype], on.device)
    if on.large:
        cases = OPS[op].cases["cuda"]
        name = LARGE.get(op, next(iter(cases)))
        yield f"{name} bf16", partial(compare, op, cases[name], torch.bfloat16, on.device)


def compare(op: str, args: tuple[Any, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Check an op at one size; see `check`."""
    torch.manual_seed(0)
    return check(OPS[op].problem(Inputs(device, dtype), *args), dtype, OPS[op].backward)


def check(problem: Problem, dtype: torch.dtype, backward: bool = True) -> dict[str, float]:
    """Return the errors of a problem's result and gradients. Raises Wrong for one beyond its tolerance."""
    wide = {name: leaf.detach().to(WIDE[dtype]) for name, leaf in problem.leaves.items()}
    truth, dy = _results(problem.plain, wide, backward)
    ours, _ = _results(problem.ours, problem.leaves, backward, dy)
    # A gradient that is zero, as that of a softmax over one key, has no scale of its own: the largest one's counts.
    sizes = {name: rms(truth[name]) for name in ours}
    largest = max(sizes.values())
    scales = {name: size if size >= ZERO * largest else largest for name, size in sizes.items()}
    errors = {name: rms_error(ours[name], truth[name], scales[name]) for name in ours}
    limit = TOLERANCE[dtype] * problem.tolerance
    if wrong := [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= limit]:
        raise Wrong(f"relative to rms and with a tolerance of {limit:.2g}: {', '.join(wrong)}")
    return errors


def _results(
    run: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor], backward: bool, dy: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the result "y" and the gradients by name, and the gradient of y that was used (dy, or a random one)."""
    leaves = {name: leaf.detach().requires_grad_(backward) for name, leaf in leaves.items()}
    y = run(leaves)
    if not backward:
        return {"y": y}, None
    dy = torch.randn_like(y) if dy is None else dy
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    found = {name: gradient for name, gradient in zip(leaves, gradients) if gradient is not None}
    return {"y": y.detach(), **found}, dy


def attention_cases(backend: str, on: Context) -> Iterator[tuple[str, Case]]:
    """Yield cases of one backend of attention, which "auto" may not choose: every mask, segments of 0 to 130 rows."""
    properties = BACKENDS[backend]
    here = (
        properties.auto or properties.gpu
        if on.large
        else backend == "segments" or (backend == "triton" and INTERPRETED)
    )
    if not (here and installed(backend)):
        return
    for mask in MASKS if properties.prefix != "refused" else ("full", "causal"):
        for dtype in on.dtypes if backend in ("triton", "segments") else ("bf16", "fp16"):
            yield f"{mask} {dtype}", partial(masked_attention, backend, mask, DTYPES[dtype], on.device)


def masked_attention(backend: str, mask: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Check a backend on ragged segments against the reference, which compares every pair of rows."""
    torch.manual_seed(0)
    new, lengths = Inputs(device, dtype), [1, 37, 0, 130]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32)
    inputs = {"cu_seqlens": cu_seqlens, "mask": MASKS[mask](device)}
    q, k, v = (new.floats(sum(lengths), heads, 64) for heads in (4, 2, 2))
    ours = partial(attention, **inputs, max_length=max(lengths), backend=backend)
    problem = Problem(
        {}, {"q": q, "k": k, "v": v}, calls(ours), calls(attention_reference, **inputs), (Cost(0, 0), Cost(0, 0))
    )
    return check(problem, dtype)


def second_gpu_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield one case of each op on the second GPU, while the first one is the current device."""
    if torch.cuda.device_count() > 1:
        for op, (args, *_) in SMALL.items():
            yield op, partial(compare, op, args, torch.bfloat16, "cuda:1")


def train_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield training steps of the smallest model: plain torch's, this project's, compiled, and without waits."""
    from mm1.bench.rungs import FULL, ladder
    from mm1.bench.train import SIZES, Steps

    dtype = "bf16" if on.large else "fp32"
    size, tokens = SIZES["digits"]
    steps = Steps(size, tokens, on.device, dtype, 1.0)
    plain = ladder(size, dtype)[0]
    first = []

    def attempt(rung: Any) -> dict[str, float]:
        if not first:  # also where the process that took the plain step died
            first.append(steps.attempt(plain))
        way = steps.attempt(rung)
        if wrong := steps.differs(way, first[0]):
            raise Wrong(wrong)
        return way.results

    for rung in (plain, FULL._replace(name="mm1, eager", compiled=False), FULL):
        yield rung.name, partial(attempt, rung)
    if on.large:
        yield "no synchronization", partial(unsynchronized, partial(steps.step, FULL, steps.sets[True][0]))


def unsynchronized(step: Callable[[], None]) -> dict[str, float]:
    """Run a step once, and once more with each wait of the host for the device being an error."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def decode_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield a decoded token, as the engine computes it, beside the last row of a prefill that is one token longer."""
    from mm1.bench.generate import TOLERANCE, Bench, prompts
    from mm1.engine.models.mm1_config import DIGITS

    dtype = "bf16" if on.large else "fp32"
    bench = Bench(DIGITS, on.device, dtype, {})

    @torch.inference_mode()
    def decode(batch: int) -> dict[str, float]:
        documents = prompts(DIGITS, 1, batch, images=False)
        step = bench.steps(documents)["mm1"]()
        tokens = bench.prefill(documents)[0]().argmax(-1)
        longer = [
            replace(d, tokens=np.append(d.tokens, np.int32(token))) for d, token in zip(documents, tokens.tolist())
        ]
        truth = bench.prefill(longer)[0]()
        errors = {name: rms_error(step().float(), truth.float()) for name in ("first", "again")}  # captured, replayed
        if max(errors.values()) > TOLERANCE[dtype]:
            raise Wrong(f"logits differ from a prefill's: {errors}")
        return errors

    for batch in (1, 3, 8):
        yield f"batch {batch} {dtype}", partial(decode, batch)


CHECKS: dict[str, Callable[[Context], Iterator[tuple[str, Case]]]] = {
    **{op: partial(op_cases, op) for op in SMALL},
    **{f"attention {name}": partial(attention_cases, name) for name in BACKENDS if name not in ("reference", "sdpa")},
    "train": train_cases, "decode": decode_cases, "second GPU": second_gpu_cases,
}  # fmt: skip


# ---- One process: the cases of a check, one line of JSON as each begins and one as it ends ----


def run_check(cases: Iterable[tuple[str, Case]], skip: int, out: Path) -> None:
    """Run the cases but for the first `skip`, and append what happens to the file `out`."""
    faulthandler.enable()
    with out.open("a") as lines:
        say = lambda **line: print(json.dumps(line), file=lines, flush=True)  # noqa: E731
        for case, run in islice(cases, skip, None):
            say(case=case)
            begin = time.monotonic()
            try:
                errors = run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                result: dict[str, Any] = {"status": "right", "errors": errors}
            except Exception as error:
                status = "wrong" if isinstance(error, Wrong) else "failed"
                text = traceback.format_exc()
                result = {"status": status, "why": f"{type(error).__name__}: {error}"[:500], "traceback": text[-6000:]}
            say(**result, seconds=time.monotonic() - begin)


# ---- The parent: processes in parallel, and what they wrote ----


@dataclass
class Process:
    """Hold a running check."""

    command: Sequence[str]
    check: str
    folder: Path
    begun: int = 0  # cases of it that began, in earlier processes too

    def __post_init__(self) -> None:
        self.path, self.log = self.folder / f"{self.begun}.jsonl", self.folder / f"{self.begun}.log"
        command = [*self.command, self.check, str(self.begun), str(self.path)]
        with self.log.open("w") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.position, self.case, self.since = 0, "", time.monotonic()

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of cases that ended since the last call."""
        if not self.path.exists():
            return
        with self.path.open() as lines:
            lines.seek(self.position)
            for text in iter(lines.readline, ""):
                if not text.endswith("\n"):
                    break
                self.position, self.since, line = self.position + len(text.encode()), time.monotonic(), json.loads(text)
                if "status" in line:
                    yield self.row(**line)
                    self.case = ""
                else:
                    self.case, self.begun = line["case"], self.begun + 1

    def row(self, **fields: Any) -> dict[str, Any]:
        return {"bench": "contact", "op": self.check, "case": self.case or "start", **fields}

    def end(self, status: str) -> dict[str, Any]:
        """Kill the process, and return the row of the case that it was at."""
        self.process.kill()
        self.process.wait()
        tail = self.log.read_text(errors="replace")[-6000:]
        return self.row(status=status, why=f"{status}, exit status {self.process.returncode}", traceback=tail)


def contact(
    record: Record,
    checks: Sequence[str] = (*CHECKS,),
    seconds: float = 240.0,
    jobs: int | None = None,
    *,
    patience: float | None = None,
    command: Sequence[str] = COMMAND,
) -> bool:
    """Run the checks, add a row for each case to the record, and return whether all were right.

    seconds: limit in all; a check that is not done by then has the status "not run". jobs: processes at once (default:
    one for each two cores, at most 8). patience: seconds of a case (default: of PATIENCE). command: what runs a
    check, given its name, the number of cases to skip, and the file for the results.
    """
    end = time.monotonic() + seconds
    patience = patience or PATIENCE["cuda" if torch.cuda.is_available() else "cpu"]
    jobs = jobs or min(8, max(1, (os.cpu_count() or 1) // 2))
    waiting, running, right = list(checks), [], True

    def add(rows: Iterable[dict[str, Any]]) -> None:
        nonlocal right
        for row in rows:
            record.add(row)
            right &= row["status"] == "right"
            why = "" if row["status"] == "right" else f"  {row['why']}"
            print(f"{row['op']:22} {row['case']:34} {row['status']}{why}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                late = time.monotonic() > end
                while waiting and len(running) < jobs and not late:
                    path = Path(folder) / waiting[0].replace(" ", "-")
                    path.mkdir()
                    running.append(Process(command, waiting.pop(0), path))
                for process in list(running):
                    status = process.process.poll()
                    add(process.results())
                    hangs = time.monotonic() - process.since > (patience if process.case else START)
                    if status is None and not (hangs or late):
                        continue
                    running.remove(process)
                    if status != 0:
                        add([process.end("not run" if late else "hung" if hangs else "died")])
                        if process.case and not late:
                            running.append(Process(command, process.check, process.folder, process.begun))
                if late:
                    add(
                        {"bench": "contact", "op": check, "case": "all", "status": "not run", "why": "no time"}
                        for check in waiting
                    )
                    waiting.clear()
                time.sleep(PAUSE)
        finally:
            for process in running:
                with suppress(OSError):
                    process.process.kill()
                process.process.wait()
    return right


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(prog="python -m mm1.bench.contact", description=__doc__)
    parser.add_argument("checks", nargs="*", help=f"checks to run, of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of records (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit in all (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="processes at once (default: half of the cores, at most 8)")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # a check's process: CHECK SKIP FILE
    args = parser.parse_args()
    if args.run:
        check, skip, path = args.run
        device = "cuda" if torch.cuda.is_available() else "cpu"
        on = Context(device, ("bf16", "fp16", "fp32") if device == "cuda" else ("bf16", "fp32"))
        return run_check(CHECKS[check](on), int(skip), Path(path))
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"unknown check {unknown.pop()!r}, expected one of {', '.join(CHECKS)}")
    path = args.out / machine_name() / f"contact-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    record = Record(path)
    right = contact(record, args.checks or [*CHECKS], args.seconds, args.jobs)
    counts = {
        s: sum(row["status"] == s for row in record.rows)
        for s in ("right", "wrong", "failed", "died", "hung", "not run")
    }
    print(f"{path}: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
