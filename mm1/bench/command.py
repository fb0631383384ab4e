"""The commands `mm1 bench kernels|train|generate|all|report|readme`."""

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
    """Time each op beside other libraries', check both, and compare with what this machine can reach at most.

    Args:
        ops: names of ops, such as moe_mlp (default: all).
        shapes: time only the cases whose name contains this.
        dtype: precision (default: bf16 on a GPU, fp32 on a CPU).
        peers: time only this other implementation; without any: all, on a CPU those without torch.compile.
        budget: seconds for each row (default: depends on the machine).
        json: file of results to write; one that exists is continued (default: none).
    """
    from mm1.bench.kernels import measure

    _measure(lambda record: measure(record, ops, shapes=shapes, dtype=dtype, peers=peers, budget=budget), json)


def train(models: tuple[str, ...] = (), /, rounds: int | None = None, json: Path | None = None) -> None:
    """Time the training step from plain eager to everything on, one change a row, with its operations.

    Args:
        models: named sizes (default: some that suit the machine).
        rounds: times that each variant is timed (default: as many as fit half a minute a model).
        json: file of results to write; one that exists is continued (default: none).
    """
    from mm1.bench.train import measure

    _measure(lambda record: measure(record, models, rounds), json)


def generate(models: tuple[str, ...] = (), /, rounds: int | None = None, json: Path | None = None) -> None:
    """Time prefill, first token and decoding of few-shot prompts.

    Args:
        models: named sizes (default: some that suit the machine).
        rounds: times that each variant is timed (default: as many as fit a second a row).
        json: file of results to write; one that exists is continued (default: none).
    """
    from mm1.bench.generate import measure

    _measure(lambda record: measure(record, models, rounds), json)


def everything(seconds: float = 530.0, json: Path | None = None) -> None:
    """Run the kernels' tests, then all benchmarks, within a limit; started again on the same day, it continues.

    Args:
        seconds: limit in all.
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
    """Rewrite the tables of measurements from this project's results.

    Args:
        pictures: folder for pictures of them (default: no pictures).
    """
    from mm1.bench.readme import rewrite

    rewrite()
    if pictures:
        from mm1.bench.pictures import pictures as draw
        from mm1.bench.record import RESULTS

        draw([RESULTS], pictures)


bench = {
    "kernels": kernels, "train": train, "generate": generate, "all": everything, "report": report, "readme": readme,
}  # fmt: skip


def _measure(measure: Callable[[Any], bool | None], path: Path | None) -> None:
    """Fill a record by `measure` and print it as one line. Exits with status 1 if an op computed something wrong."""
    from mm1.bench.record import Record

    record = Record(path)
    correct = measure(record) is not False
    print(record.last_line())
    sys.exit(0 if correct else 1)
