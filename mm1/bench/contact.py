"""Check this project on a GPU on which it has never run: each op against its reference, then graphs and whole steps.

    python -m mm1.bench.contact [--out FOLDER] [--seconds 240] [--jobs 8] [CHECK …]

It needs torch, triton and numpy, and no other package. Each check runs in a process of its own, several at once, which
also spreads the compilation of kernels over the processor's cores: those of the small cases take 108 seconds of CPU for
an H200, 21 of them in the longest check, so that nothing is compiled in advance. A case that fails, dies or hangs costs
that case alone: the check continues with the next one. All results go into one record, failures with their tracebacks,
and with the ops that are to blame: those without whose kernels the case is right, or the one that ran when the process
died. `mm1 doctor --gpu` does the same, and lets the user's runs compute these ops in plain torch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm1.bench.checks import CHECKS, DEAD, WHOLE, Context, Op, run_check
from mm1.bench.record import OUT, Record, machine_name
from mm1.kernels.fallback import memory, remember

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "mm1.bench.contact", "--run")
PAUSE = 0.2  # seconds between two looks at the processes
PATIENCE = {"cuda": 120.0, "cpu": 600.0}  # seconds of a case, or of one attempt of the search for whom to blame
START = 300.0  # seconds that a process may take to begin its first case


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
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "MM1_STRICT": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.position, self.case, self.since = 0, "", time.monotonic()
        self.ops: list[Op] = []  # the one that began last

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
                    self.case, self.ops = "", []
                elif "begins" in line:
                    self.ops = [line["begins"]]
                elif "case" in line:
                    self.case, self.begun = line["case"], self.begun + 1

    def row(self, **fields: Any) -> dict[str, Any]:
        return {"bench": "contact", "op": self.check, "case": self.case or "start", **fields}

    def end(self, status: str) -> dict[str, Any]:
        """Kill the process, and return the row of the case that it was at; no op is to blame when time runs out."""
        self.process.kill()
        self.process.wait()
        tail = self.log.read_text(errors="replace")[-6000:]
        why = f"{status}, exit status {self.process.returncode}"
        return self.row(status=status, why=why, traceback=tail, blamed=[] if status == "not run" else self.ops)


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
                    case, dead = process.case, status == DEAD and not process.case
                    if status != 0 and not dead:
                        add([process.end("not run" if late else "hung" if hangs else "died")])
                    if status != 0 and not late and (case or dead):
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


def first_contact(out: Path = OUT, **options: Any) -> tuple[bool, Record]:
    """Run checks with options of `contact`, print their table and the path of their record in the folder `out`.

    Returns whether all were right, and the record.
    """
    record = Record(out / machine_name() / f"contact-{time.strftime('%Y-%m-%d-%H%M%S')}.json")
    right = contact(record, **options)
    counts = {
        s: sum(row["status"] == s for row in record.rows)
        for s in ("right", "wrong", "failed", "died", "hung", "not run")
    }
    print(f"{record.path}: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}")
    return right, record


def blamed(rows: Iterable[dict[str, Any]]) -> dict[Op, str]:
    """Return the ops that are to blame for a case that was not right, and what the first such case was."""
    why: dict[Op, str] = {}
    for row in rows:
        for op, dtypes in row.get("blamed", []):
            why.setdefault((op, dtypes), f"{row['op']} {row['case']} was {row['status']} ({row['why']})"[:300])
    return why


def examine(gpu: str, **options: Any) -> bool:
    """Run first contact, and let this user's runs compute the ops that are to blame in plain torch.

    gpu: name of the GPU, as `torch_name` returns it. options: of `first_contact`. Returns whether all were right.
    """
    right, record = first_contact(**options)
    failed = blamed(record.rows)
    remember(gpu, failed, complete=all(row["status"] != "not run" for row in record.rows))
    for (op, dtypes), why in failed.items():
        print(f"{op} ({dtypes}) will run in plain torch: {why}")
    print(f"Ops that run in plain torch are listed in {memory()}.")
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
        return run_check(CHECKS[check](on), int(skip), Path(path), wait=check not in WHOLE)
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"unknown check {unknown.pop()!r}, expected one of {', '.join(CHECKS)}")
    checks = args.checks or [*CHECKS]
    right, _ = first_contact(args.out, checks=checks, seconds=args.seconds, jobs=args.jobs)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
