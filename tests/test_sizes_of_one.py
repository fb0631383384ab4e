"""Kernels compile where a size is 1, which Triton's launcher turns into a constant of the kernel."""

import itertools

import pytest
import torch
from conftest import compiles

from mm1.kernels.abstractor import pooling
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import recording
from mm1.kernels.moe import combine, experts, grouped, routing
from mm1.kernels.patches import embedding, position_tables
from mm1.kernels.patches.grids import Grids

pytestmark = compiles
FP32 = torch.float32


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape):
    return empty(*shape, dtype=torch.int32)


def expert_calls():
    for T, E, D, F in itertools.product((1, 3), repeat=4):
        x, gate_up, down = empty(T, D), empty(E, 2 * F, D), empty(E, D, F)
        index, weight, order = integers(T, 1), empty(T, 1, dtype=FP32), (integers(T), integers(T, 1), integers(E))
        yield lambda E=E, index=index: routing.sort(index, E)
        yield lambda a=empty(T, D), b=empty(E, D, F), E=E: grouped.gemm(a, b, integers(E), tail=True)
        yield lambda a=empty(T, D), dy=empty(T, F), dw=empty(E, D, F), E=E: grouped.dw(a, dy, integers(E), dw)
        yield lambda x=x, order=order, w=weight, g=gate_up, d=down: experts.moe_mlp_forward(
            x, order, w, g, None, d, None, None, "silu", None, 0.0, False, False
        )
        yield lambda x=x, slots=index, w=weight, E=E: combine.combine(x, slots, w, offsets=integers(E))


def image_calls():
    for gh, gw, D, count in itertools.product((1, 3), (1, 3), (1, 16), (1, 2)):
        grids, table = Grids([(1, 1)] * count, device="meta"), empty(gh, gw, D)
        for mode in ("bilinear", "bicubic"):
            how = 1, mode, True, False
            yield lambda t=table, g=grids, how=how: position_tables.forward(t, g.table, g.owner, *how)
            yield lambda t=table, g=grids, how=how, n=count, D=D: position_tables.backward(
                empty(n, D), g.table, t.shape, *how
            )
            for patch in (1, 14):
                pixels, weight = empty(count * patch**2, 3, dtype=torch.uint8), empty(D, patch**2 * 3)
                yield lambda p=pixels, w=weight, t=table, g=grids, k=patch, how=how: embedding.forward(
                    p, w, None, t, g.table, g.owner, k, [1.0] * 3, [0.0] * 3, *how
                )
        yield lambda g=grids, n=count, D=D: pooling.forward(empty(n, D), g.table, g.owner, 1, 1)


def read_by_the_front_end(launch, device):
    """Translate a launch to Triton's first intermediate language, where types are checked."""
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    from mm1.autotune.static import specialize, target_of

    target = target_of(device)
    backend = make_backend(target)
    options, context = backend.parse_options(dict(launch.options)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(launch.kernel, *specialize(launch))
    functions = backend.get_codegen_implementation(options)
    source.make_ir(target, options, functions, backend.get_module_map(), context)


@pytest.mark.parametrize("calls", [expert_calls, image_calls])
@pytest.mark.parametrize("name", ["h200", "mi300x"])
def test_every_launch_has_types(calls, name):
    from mm1.autotune.static import specialize

    device, launches = DEVICES[name], {}
    for call in calls():
        with recording(device) as recorded:
            call()
        for launch in recorded:
            launches[repr((launch.kernel.fn.__name__, specialize(launch)))] = launch
    assert len(launches) > 20
    for launch in launches.values():
        read_by_the_front_end(launch, device)
