"""Honest clients of a server get their answers while others attack it in every known way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="serving is an extra")


@pytest.mark.slow
def test_honest_clients_are_answered_amid_attacks(tmp_path):
    """`make chaos` does the same for ten minutes with 200 clients."""
    out = tmp_path / "found.json"
    command = [sys.executable, "chaos_run.py", "--seconds", "60", "--clients", "60", "--out", str(out)]
    subprocess.run(command, cwd=Path(__file__).parent, timeout=400, check=False, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    assert (found["failed"], found["exit"]) == (0, 0), found["failures"]
    assert found["count"]["stream"] > 50
    assert any(name.startswith("attack_schema") for name in found["count"])
