"""What the first contact with a GPU launches, forward and backward in every dtype, compiles to code that fits.

Another Triton than the installed one is chosen by PYTHONPATH, as `pip install --no-deps --target FOLDER triton==3.6.0`
and PYTHONPATH=FOLDER.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compiles
from launches import GPUS, read

from mm1.autotune.static import compile_launch, distinct
from mm1.bench.checks import SMALL

pytestmark = compiles
# Instructions of spills: to fit one more program on a multiprocessor, ptxas saves up to four registers, stores each of
# them once and loads it where it is used. Where registers do not suffice, there are dozens.
SAVED = 10
UNALIGNED = "(100, 8, 72, 200)"  # rows of 144 bytes, which only bulk copies load without spills
BY_TORCH = ("qwen_embed",)  # without positions it is one product of torch


def check(gpu: str, op: str, folder: Path, only: str = "") -> None:
    """Compile the different launches of an op's cases, those with `only` in their name, and collect all faults."""
    file, device = folder / "launches", GPUS[gpu]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("launches.py")), gpu, op, str(file)]
    subprocess.run(command, check=True, env=environment)
    launches = [(case, launch) for case, launch in read(file) if only in case]
    cases = {id(launch): case for case, launch in launches}
    faults = []
    for launch in distinct(launch for _, launch in launches):
        case = cases[id(launch)]
        place = f"{launch.name} of {case}"
        try:
            code = compile_launch(launch, device)
        except Exception as error:
            faults.append(f"{place}: {type(error).__name__}: {error}"[:300])
            continue
        if code.spills > SAVED and not (UNALIGNED in case and not device.tma):
            faults.append(f"{place}: {code.spills} spills")
        if code.shared > device.shared:
            faults.append(f"{place}: {code.shared} bytes of shared memory, {gpu} has {device.shared}")
    assert launches
    assert not faults, "\n".join(faults)


def test_an_h200_can_embed_patches_of_14_pixels(tmp_path):
    """Patches of 14 pixels have rows of 42 bytes, which `_cut_kernel` reads in words of 2."""
    check("h200", "patch_embed", tmp_path, only="('native', 4, 1280)")


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", [*(op for op in SMALL if op not in BY_TORCH), "masks"])
def test_every_op_compiles(op, gpu, tmp_path):
    check(gpu, op, tmp_path)
