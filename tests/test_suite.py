"""pytest-benchmark stores and compares the benchmarks of mm1/bench/suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compiles

from mm1.bench.suite.test_kernel_times import Replay

SUITE = Path(__file__).parents[1] / "mm1" / "bench" / "suite"


def run(folder, chosen, *options):
    command = [sys.executable, "-m", "pytest", "-q", str(SUITE), "-k", chosen, "-p", "no:cacheprovider",
               "--benchmark-storage", str(folder), *options]  # fmt: skip
    # Where pytest-xdist is at work, as it may be here, pytest-benchmark does nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_round_takes_as_long_as_its_sample():
    timer = Replay()
    timer.samples = iter([0.5, 2.0])
    begins_and_ends = [timer() for _ in range(4)]
    assert begins_and_ends == [0.0, 0.5, 0.5, 2.5]


@compiles
def test_runs_are_stored_with_our_samples_and_compared(tmp_path):
    pytest.importorskip("pytest_benchmark")
    chosen = "look_up or (adaptive_pool and forward-) or (machine_code and h200 and pool)"
    first = run(tmp_path, chosen, "--benchmark-autosave")
    assert first.returncode == 0, first.stdout
    saved = json.loads(next(tmp_path.rglob("*.json")).read_text())["benchmarks"]
    found = {b["name"].partition("[")[0]: b for b in saved}
    assert set(found) == {"test_kernel", "test_look_up", "test_first_look_up", "test_machine_code"}
    kernel, code = found["test_kernel"], found["test_machine_code"]["extra_info"]
    assert "samples of mm1.autotune.clock" in kernel["options"]["timer"]
    assert kernel["stats"]["median"] == pytest.approx(kernel["extra_info"]["median"], rel=1e-4)
    assert all(facts["spills"] == 0 and facts["registers"] > 0 for facts in code.values())
    second = run(tmp_path, "look_up", "--benchmark-compare")
    assert "(NOW)" in second.stdout
    assert "(0001_" in second.stdout
