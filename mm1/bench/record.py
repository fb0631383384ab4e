"""Keep measurements in one JSON file: a header with the commit, machine and versions, and rows.

A row is a dict. "bench" is the name of its benchmark, and the fields in KEY identify the measurement. "variants" holds
by name {"median", "low", "high", "n", "samples"} in seconds and further fields; "failed" holds reasons of missing ones.
"""

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mm1.autotune.doctor import installed_version, processor
from mm1.errors import UserError
from mm1.kernels.dispatch import device_of_index

RESULTS = Path(__file__).parent / "results"  # this project's records, in a clone but not in an installed package
OUT = Path("bench-results")  # the default folder for new records, in the working directory
KEY = ("bench", "op", "model", "case", "dtype", "what", "mode")  # fields that identify a row
PEERS = ("transformers", "timm", "megablocks", "xformers", "flash_attn", "liger_kernel", "torchao")
SIGNIFICANT = 5  # significant digits of a sample

Row = dict[str, Any]


class Record:
    """Keep rows in memory and, with a path, write each to that file at once, so that a killed process loses nothing.

    An existing file is continued if its commit, machine and versions are the current ones; otherwise UserError is
    raised. If a process died while it measured a row, that row is added as failed, and the next process continues after
    it.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.header, self.rows = path, dict(header()), []
        if path is not None and path.exists():
            earlier = read(path)
            for name in ("commit", "device", "versions"):
                if (value := earlier["header"].get(name)) != self.header[name]:
                    raise UserError(f"{name} of {path} is {value}, expected {self.header[name]}: name another file")
            self.header, self.rows = earlier["header"], earlier["rows"]
            if earlier.get("now"):
                self.add({**earlier["now"], "variants": {}, "failed": {"mm1": "the process died"}})

    def has(self, **fields: Any) -> bool:
        """Return whether there is a row with these fields."""
        return any(all(row.get(name) == value for name, value in fields.items()) for row in self.rows)

    @contextmanager
    def at(self, **fields: Any) -> Iterator[None]:
        """Record in the file which row the block measures, in case the process dies."""
        self._write(fields)
        try:
            yield
        finally:
            self._write()

    def add(self, row: Row) -> None:
        """Add a row and write the file."""
        self.rows.append(rounded(row))
        self._write()

    def _write(self, now: Row | None = None) -> None:
        if self.path is None:
            return
        # Each row is one line, so that diffs are readable.
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        state = f'"now": {json.dumps(now)},\n' if now else ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f'{{"header": {json.dumps(self.header)},\n{state}"rows": [\n{rows}\n]}}\n')
        os.replace(part, self.path)

    def last_line(self) -> str:
        """Return everything except the samples in one line of JSON."""
        return json.dumps({**self.header, "rows": [without_samples(row) for row in self.rows]})


def read(path: Path) -> dict[str, Any]:
    """Read {"header": …, "rows": […]}. Raises UserError if the file is not such a record."""
    try:
        record = json.loads(path.read_text())
        rows, header = record["rows"], record["header"]
        if not (isinstance(header, dict) and all(isinstance(row, dict) and "bench" in row for row in rows)):
            raise TypeError("no rows")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a record of mm1 bench ({type(error).__name__}: {error})") from None
    return record


def key(row: Row) -> tuple[Any, ...]:
    """Return the values that identify a row."""
    return tuple(row.get(name) for name in KEY)


def file(folder: Path = OUT) -> Path:
    """Return the path for today's results of this commit on this machine: <folder>/<gpu>/<date>-<commit>.json."""
    now = header()
    return folder / machine_name() / f"{now['date']}-{now['commit'][:10]}.json"


def machine_name() -> str:
    """Return the GPU's name as in tables, or without a GPU the name of the processor and the number of threads."""
    if torch.cuda.is_available():
        return device_of_index(None).name
    return re.sub(r"\W+", "-", f"{_processor()} {torch.get_num_threads()} threads".lower()).strip("-")


@functools.cache
def header() -> dict[str, Any]:
    """Return date, time, commit, machine and versions."""
    gpu, changed = torch.cuda.is_available(), "+changes" if _git("status", "--porcelain", "-uno") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now().time().isoformat("seconds"),
        "commit": (_git("rev-parse", "HEAD") or "unknown") + changed,
        "machine": machine_name(),
        "device": torch.cuda.get_device_name() if gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            **{name: installed_version(name) for name in ("triton", *PEERS)},
        },
    }  # fmt: skip


def _git(*arguments: str) -> str:
    """Return what git prints, or nothing where it is not installed, as in bare images, or this is no clone."""
    with suppress(OSError):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return ""


def rounded(value: Any) -> Any:
    """Round floats to SIGNIFICANT digits."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, float) else value


def without_samples(row: Row) -> Row:
    """Return the row without the samples of its variants."""
    variants = row.get("variants", {}).items()
    return {**row, "variants": {name: {k: x for k, x in v.items() if k != "samples"} for name, v in variants}}


def _processor() -> str:
    """Return the processor with its vector instructions, because virtual machines give several generations one name."""
    return f"{processor('model name') or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
