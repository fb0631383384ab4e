"""Define the commands `mm1 bench kernels|static|train|generate|all|report|readme` and `mm1 doctor`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

Repeated = tyro.conf.UseAppendAction


def kernels(
    ops: tuple[str, ...] = (),
    /,
    shapes: Repeated[tuple[str, ...]] = (),
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    peers: Repeated[tuple[str, ...]] = (),
    budget: float | None = None,
    json: Path | None = None,
) -> None:
    """Check and time each op and its peers in other libraries, and compare them with this machine's ceilings.

    Args:
        ops: names of ops, such as moe_mlp (default: all).
        shapes: part of a case's name; other cases are skipped.
        dtype: precision (default: bf16 on a GPU, fp32 on a CPU).
        peers: name of a peer; other peers are skipped. Without it all are timed, on a CPU those without torch.compile.
        budget: seconds for each row (default: 0.4 on a GPU, 4 on a CPU).
        json: file of results to write, or to continue if it exists (default: none).
    """
    from mm1.bench.kernels import measure

    _measure(lambda record: measure(record, ops, shapes=shapes, dtype=dtype, peers=peers, budget=budget), json)


def static(ops: tuple[str, ...] = (), /, device: str = "h200", json: Path | None = None) -> None:
    """Compile kernels for a GPU that need not be here, and judge their machine code, beside that of other libraries.

    Args:
        ops: names of ops, such as moe_mlp (default: all).
        device: name of the GPU, one of NVIDIA.
        json: file of results to write (default: none).
    """
    from mm1.bench.static import measure

    _measure(lambda record: measure(record, ops, device), json)


def train(models: tuple[str, ...] = (), /, rounds: int | None = None, json: Path | None = None) -> None:
    """Time the training step from plain eager torch to everything on, one change at a time.

    Args:
        models: named sizes (default: some that suit the machine).
        rounds: number of times that each variant is timed (default: as many as fit half a minute per model).
        json: file of results to write, or to continue if it exists (default: none).
    """
    from mm1.bench.train import measure

    _measure(lambda record: measure(record, models, rounds), json)


def generate(models: tuple[str, ...] = (), /, rounds: int | None = None, json: Path | None = None) -> None:
    """Time prefill, first token and decoding of few-shot prompts.

    Args:
        models: named sizes (default: some that suit the machine).
        rounds: number of times that each variant is timed (default: as many as fit a second per row).
        json: file of results to write, or to continue if it exists (default: none).
    """
    from mm1.bench.generate import measure

    _measure(lambda record: measure(record, models, rounds), json)


def everything(seconds: float = 530.0, json: Path | None = None) -> None:
    """Run the kernels' tests and all benchmarks within a time limit. A second run on the same day continues the first.

    Args:
        seconds: total time limit.
        json: file of results (default: a file named by date and commit in ./bench-results).
    """
    from mm1.bench.record import Record
    from mm1.bench.run import run

    print(Record(run(json, seconds)).last_line())


def report(paths: tuple[Path, ...] = (), /, out: Path = Path("report.html")) -> None:
    """Write one self-contained HTML page of results.

    Args:
        paths: files or folders of results (default: ./bench-results).
        out: file to write.
    """
    from mm1.bench.report import report

    report(paths, out)
    print(out)


def readme(pictures: Path | None = None) -> None:
    """Rewrite the tables of measurements in README.md and docs from this project's results.

    Args:
        pictures: folder for charts of the results (default: no charts).
    """
    from mm1.bench.readme import rewrite

    rewrite()
    if pictures:
        from mm1.bench.pictures import pictures as draw
        from mm1.bench.record import RESULTS

        draw([RESULTS], pictures)


bench = {
    "kernels": kernels, "static": static, "train": train, "generate": generate, "all": everything, "report": report,
    "readme": readme,
}  # fmt: skip


def doctor(json: bool = False, gpu: bool = False) -> None:
    """Print GPU, driver, versions, backends and tables of this machine, and how to install what is missing.

    Args:
        json: print one JSON object as the last line.
        gpu: then run every op on the GPU beside its reference, which takes at most four minutes, and write one file
            with all failures. From then on this user's runs compute an op whose kernels are wrong there in plain torch.
    """
    import torch

    from mm1.autotune.doctor import doctor
    from mm1.errors import UserError

    if gpu and not torch.cuda.is_available():
        raise UserError(
            "doctor --gpu: torch sees no GPU, and `mm1 doctor` says why; `python -m mm1.bench.contact` checks the ops "
            "on a CPU, and with TRITON_INTERPRET=1 the source of their kernels"
        )
    doctor(json)
    if gpu:
        from mm1.bench.contact import examine
        from mm1.kernels.fallback import torch_name

        sys.exit(0 if examine(torch_name(torch.device("cuda", torch.cuda.current_device()))) else 1)


def _measure(measure: Callable[[Any], bool | None], path: Path | None) -> None:
    """Fill a record by `measure`, print it as one line, and exit with status 1 if an op's result was wrong."""
    from mm1.bench.record import Record

    os.environ.setdefault("MM1_STRICT", "1")  # what plain torch computes is not mm1's kernel
    record = Record(path)
    correct = measure(record) is not False
    print(record.last_line())
    sys.exit(0 if correct else 1)
