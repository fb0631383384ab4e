"""The C library, built for a GPU of each vendor, passes its tests with a stub of the driver on any machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import not_interpreted

ROOT = Path(__file__).parent.parent


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@not_interpreted
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("cc")), reason="needs cmake and a C compiler")
def test_the_library_is_built_and_passes_its_tests(tmp_path):
    build = str(tmp_path)
    run("cmake", "-S", ".", "-B", build, "-DMM1_ARCHS=90;gfx942", "-DMM1_VARIANTS=1")
    run("cmake", "--build", build)
    assert "100% tests passed" in run("ctest", "--test-dir", build, "--output-on-failure")
