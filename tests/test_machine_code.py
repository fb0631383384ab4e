"""The main loop of machine code is found, and what a step and a tile's ends execute is counted."""

import pytest
import torch

from mm1.autotune.machine_code import Loop, main_loop
from mm1.autotune.space import KERNELS
from mm1.autotune.static import Task, compile_task
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import config_for

PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24"


def listing(*lines: str) -> str:
    """Return lines as nvdisasm prints them: labels at the margin, instructions with their addresses."""
    text = []
    for at, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;")
    return "\n".join(text)


def test_the_main_loop_is_that_of_the_products_and_its_ends_are_the_shortest_way():
    code = listing(
        "S2R R0, SR_TID.X", "@P0 BRA `(.L_x_9)",
        ".L_x_0:", "LDC R1, c[0x0][0x28]", "BSSY B0, `(.L_x_9)",
        ".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12]", "@!P0 BRA `(.L_x_5)",
        ".L_x_2:", "BAR.SYNC.DEFER_BLOCKING 0x0", PRODUCT, "@P1 UIADD3 UR4, UR4, 0x1, URZ", "@!P1 BRA `(.L_x_1)",
        "@P2 BRA `(.L_x_3)", "STG.E [R2.64], R4", "STG.E [R2.64], R4", "BRA `(.L_x_4)",
        ".L_x_3:", "UTMASTG.2D [UR4], [UR6]",
        ".L_x_4:", "@!P3 BRA `(.L_x_0)",  # the next tile
        ".L_x_9:", "EXIT",
        ".L_x_5:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12]", "@!P0 BRA `(.L_x_5)", "BRA `(.L_x_2)",  # out of line
    )  # fmt: skip
    # Two warp groups multiply 64 × 256 × 16 each. Before the loop 4 instructions; after it, with the bulk store, 4.
    assert main_loop(code, 8) == Loop(6, 2 * 2 * 64 * 256 * 16, 1, 8)
    assert main_loop(code, 4).flops == 2 * 64 * 256 * 16


def test_of_two_loops_with_as_many_products_the_shorter_one_counts():
    step = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    code = listing(
        ".L_x_0:", "S2R R0, SR_TID.X",
        ".L_x_1:", step, "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "ISETP.LT.AND P0, PT, R1, R2, PT", "FSEL R1, R2, R3, P0", step, "@P0 BRA `(.L_x_2)",
        "@P1 BRA `(.L_x_0)", "EXIT",  # the next tile, after the loops over whole blocks and over those with masks
    )  # fmt: skip
    assert main_loop(code, 4) == Loop(3, 4 * 2 * 16 * 8 * 16, 0, 7)


def test_without_products_it_is_the_loop_with_barriers():
    code = listing(
        ".L_x_0:", "LDG.E R1, [R2.64]", "BAR.SYNC.DEFER_BLOCKING 0x0",
        ".L_x_1:", "LDG.E R1, [R2.64]", "IADD3 R3, R3, 0x1, RZ", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert main_loop(code, 4) == Loop(6, 0, 1, 1)
    assert main_loop(listing("MOV R1, R2", "EXIT"), 4) == Loop(ends=2)


# Operations of a step of the main loop, from the tile alone
STEPS = {
    "grouped_gemm": ((16384, 64, 8064, 3072), lambda c: 2 * c.block_m * c.block_n * c.block_k),
    "flash": ((729, 1024, 1024, 80, False), lambda c: 4 * c.block_m * c.block_n * 80),
    "experts_up": ((16384, 64, 3072, 8064, True), lambda c: 4 * c.block_m * c.block_n * c.block_k),
    "few_tokens": ((32, 64, 3072, 8064, True), lambda c: 4 * c.block_m * c.block_n * c.block_k),
    "flash_dq": ((729, 1024, 1024, 80, False), lambda c: 6 * c.block_m * c.block_n * 80),
    "flash_dkv": ((729, 1024, 1024, 80, False), lambda c: 8 * c.block_m * c.block_n * 80),
    "patch_embed": ((46656, 588, 1280), lambda c: 2 * c.block_m * c.block_n * c.block_k),
}


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=[pytest.mark.slow] * (at > 1))
                                    for at, name in enumerate(STEPS)])  # fmt: skip
@pytest.mark.parametrize("device", ["h200", "a100"])
def test_the_main_loop_of_a_kernel_has_the_operations_of_a_step_of_its_tile(kernel, device):
    sizes, operations = STEPS[kernel]
    tunable, gpu = KERNELS[kernel].tunable, DEVICES[device]
    config = config_for(tunable, tunable.shape(*sizes), torch.bfloat16, gpu)
    code = next(c for c in compile_task(Task(kernel, sizes, config, 16, device)) if c.name in KERNELS[kernel].launched)
    assert code.loop.flops == operations(config)
    assert 0 < code.loop.instructions < sum(code.instructions.values())
    assert 0 < code.loop.ends < sum(code.instructions.values()) - code.loop.instructions
