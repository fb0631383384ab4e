"""Report each kernel's registers, spills, shared memory and matrix instructions on GPUs that this machine may lack.

The seconds are those of the compiler, or of reading its result from disk. `mm1 tune --check` tests that code gets no
worse.
"""

import pytest
import torch

from mm1.autotune.space import KERNELS
from mm1.autotune.static import Task, compile_task, fault
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import config_for


@pytest.mark.parametrize("device", ["a100", "h200", "b200", "rtx5090", "mi300x"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(benchmark, kernel, device):
    tunable = KERNELS[kernel].tunable
    shape = next(KERNELS[kernel].shapes())
    config = config_for(tunable, shape, torch.bfloat16, DEVICES[device])
    task = Task(kernel, tuple(shape), config, 16, device)
    codes = benchmark.pedantic(compile_task, args=(task,))
    assert fault(task, codes) is None
    benchmark.group = f"compiler, {device}"
    benchmark.extra_info |= {code.name: code.facts(DEVICES[device]) | {"spills": code.spills} for code in codes}
