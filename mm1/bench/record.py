"""Keep measurements in one JSON file: a header that says where and with what they were made, and rows.

A row is a dict. "bench" names its benchmark; its key fields say what was measured; "variants" holds by name {"median",
"low", "high", "n", "samples"} in seconds and further facts; "failed" says why a variant is missing.
"""

import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mm1.errors import UserError
from mm1.kernels.dispatch import device_of_index

RESULTS = Path(__file__).parent / "results"  # records of this project, in a clone; an installed package has none
OUT = Path("bench-results")  # where records go by default, in the working directory
KEY = ("bench", "op", "model", "case", "dtype", "what", "mode")  # fields that identify a row
PEERS = ("transformers", "timm", "megablocks", "xformers", "flash_attn", "liger_kernel", "torchao")
SIGNIFICANT = 5  # digits of a sample

Row = dict[str, Any]


class Record:
    """Keeps rows in memory and, with a path, writes each to that file at once, so that a killed process loses nothing.

    A file that exists is continued; it must be of this commit, machine and versions. A row over which a process died is
    added as failed, so that the next process continues with the row after it. Raises UserError for another file.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.header, self.rows = path, dict(header()), []
        if path is not None and path.exists():
            found = read(path)
            for name in ("commit", "device", "versions"):
                if found["header"].get(name) != self.header[name]:
                    raise UserError(
                        f"{path} holds results of another {name}, expected {self.header[name]}: name another file"
                    )
            self.header, self.rows = found["header"], found["rows"]
            if found.get("now"):
                self.add({**found["now"], "variants": {}, "failed": {"mm1": "the process died"}})

    def has(self, **fields: Any) -> bool:
        return any(all(row.get(name) == value for name, value in fields.items()) for row in self.rows)

    @contextmanager
    def at(self, **fields: Any) -> Iterator[None]:
        """Note in the file that rows of these fields are being measured in this block, in case the process dies."""
        self._write(fields)
        try:
            yield
        finally:
            self._write()

    def add(self, row: Row) -> None:
        self.rows.append(rounded(row))
        self._write()

    def _write(self, now: Row | None = None) -> None:
        if self.path is None:
            return
        # One line for each row, for readable diffs.
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        state = f'"now": {json.dumps(now)},\n' if now else ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f'{{"header": {json.dumps(self.header)},\n{state}"rows": [\n{rows}\n]}}\n')
        os.replace(part, self.path)

    def last_line(self) -> str:
        """Return everything but the samples, in one line of JSON."""
        return json.dumps({**self.header, "rows": [without_samples(row) for row in self.rows]})


def read(path: Path) -> dict[str, Any]:
    """Read {"header": …, "rows": […]}. Raises UserError if the file is not such a record."""
    try:
        found = json.loads(path.read_text())
        rows, header = found["rows"], found["header"]
        if not (isinstance(header, dict) and all(isinstance(row, dict) and "bench" in row for row in rows)):
            raise TypeError("no rows")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a record of mm1 bench ({type(error).__name__}: {error})") from None
    return found


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def file(folder: Path = OUT) -> Path:
    """Return the path for today's results of this commit on this machine: <folder>/<gpu>/<date>-<commit>.json."""
    now = header()
    return folder / machine_name() / f"{now['date']}-{now['commit'][:10]}.json"


def machine_name() -> str:
    """Return the name of the GPU's tables, or without a GPU the processor and its threads."""
    if torch.cuda.is_available():
        return device_of_index(None).name
    return re.sub(r"\W+", "-", f"{_processor()} {torch.get_num_threads()} threads".lower()).strip("-")


@functools.cache
def header() -> dict[str, Any]:
    """Describe date, commit, machine and versions."""
    git = lambda *args: subprocess.run(  # noqa: E731
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    gpu, changed = torch.cuda.is_available(), "+changes" if git("status", "--porcelain", "-uno") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now().time().isoformat("seconds"),
        "commit": (git("rev-parse", "HEAD") or "unknown") + changed,
        "machine": machine_name(),
        "device": torch.cuda.get_device_name() if gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("triton", *PEERS)},
        },
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Round floats to SIGNIFICANT digits."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, float) else value


def without_samples(row: Row) -> Row:
    variants = {
        name: {k: v for k, v in found.items() if k != "samples"} for name, found in row.get("variants", {}).items()
    }
    return row | ({"variants": variants} if variants else {})


def _processor() -> str:
    """Return the processor with its vector instructions, as virtual machines give several generations one name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return f"{names[0].strip() if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(name: str) -> str | None:
    """Return a module's version without importing it; None if it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    distributions = metadata.packages_distributions().get(name, [name])
    try:
        return metadata.version(distributions[0])
    except metadata.PackageNotFoundError:
        return "unknown"
