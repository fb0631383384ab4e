"""Kernels compile where a size is 1, which Triton's launcher turns into a constant of the kernel."""

import itertools

import pytest
import torch
from conftest import compiles

from mm1.kernels.abstractor import bottleneck, pooling
from mm1.kernels.attention import flash, paged
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import recording
from mm1.kernels.linear_cross_entropy import loss_in_place
from mm1.kernels.moe import combine, experts, few_tokens, grouped, routing
from mm1.kernels.patches import embedding, loss, position_tables
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
        for patch, channels in ((1, 1), (14, 3)):
            x, rows, weight = empty(count, D), integers(count), empty(patch**2 * channels, D)
            pixels, scale = empty(count * patch**2, channels, dtype=torch.uint8), [1.0] * channels
            how = pixels, rows, [grids.table, grids.owner], [patch, patch, 1], scale, scale, 1e-6, torch.bfloat16
            yield lambda x=x, w=weight, how=how: loss.forward(x, w, None, *how)
            yield lambda x=x, w=weight, how=how, n=count: loss.backward(
                empty(n, dtype=FP32), x, w, empty(len(w)), *how, [True] * 3
            )
        yield lambda g=grids, n=count, D=D: pooling.forward(empty(n, D), g.table, g.owner, 1, 1)


def layer_calls():
    """Mixture layers with biases in every layout, their gradients, and routing."""
    for T, K, D, F in itertools.product((1, 3), (1, 2), (1, 16), (1, 16)):
        x, order, weight = empty(T, D), (integers(T * K), integers(T, K), integers(2)), empty(T, K, dtype=FP32)
        for layout in ("gate_up", "apart", "interleaved", "no gate"):
            gated, apart = layout != "no gate", layout == "apart"
            gate_up, up = empty(2, F if apart or not gated else 2 * F, D), empty(2, F, D) if apart else None
            biases = None if apart else empty(2, gate_up.shape[1]), empty(2, D)
            how = "silu", 7.0 if gated else None, 0.0, layout == "interleaved"
            weights = (gate_up, up, empty(2, D, F), *biases)
            yield lambda x=x, o=order, w=weight, ws=weights, how=how: experts.moe_mlp_forward(x, o, w, *ws, *how, True)
            h = empty(T * K, (1 + gated) * F)
            yield lambda x=x, h=h, o=order, w=weight, ws=weights, how=how: experts.moe_mlp_backward(
                x, x, h, o, w, *ws, *how, True
            )
            yield lambda x=x, o=order, w=weight, ws=weights, how=how: experts.moe_mlp_few(x, o[1], w, *ws, *how)
        yield lambda x=x, F=F, D=D: few_tokens.by_slot(
            x, None, 1, empty(1, F, D, dtype=torch.int8), gate_scale=empty(1, F, dtype=FP32)
        )
        yield lambda y=empty(T * K, D), order=order, w=weight: combine.combine(y, order[1], w, experts=2)
    for T, E, k, masked in itertools.product((1, 3), (1, 3), (1, 2), (False, True)):
        if k <= E:
            logits, mask = empty(T, E), empty(T, dtype=torch.bool) if masked else None
            dweight, loss, first = empty(T, k, dtype=FP32), empty(dtype=FP32), empty(E, dtype=FP32)
            yield lambda x=logits, m=mask, k=k: routing.route_forward(x, m, k, True)
            yield lambda x=logits, m=mask, dw=dweight, loss=loss, first=first: routing.route_backward(
                dw, loss, loss, x, m, dw.int(), first, True
            )


def block_calls():
    """Convolutional blocks and pools of images of one patch or more."""
    for sizes, C, width, pool in itertools.product(
        ([(1, 1)], [(1, 2), (3, 1)]), (1, 16), (1, 16), ((0, 0), (1, 1), (1, 2))
    ):
        grids, N, S = Grids(sizes, device="meta"), len(sizes), max(1, C // 4)
        P, geometry = grids.patches, (grids.table, grids.owner, grids.strips)
        norm = empty(C), empty(C)
        weights = [empty(C, width), *norm, empty(C, 9), *norm, empty(S, C), empty(S), empty(C, S), empty(C),
                   empty(C, C), *norm, *([empty(C, width), *norm] if width != C else [])]  # fmt: skip
        x, u, dy = empty(P, width), empty(P, C), empty(N * pool[0] * pool[1] or P, C)
        saved = u, u, u if width != C else empty(0), empty(N, C), empty(N, S), empty(N, C)
        yield lambda x=x, g=geometry, w=weights, pool=pool: bottleneck.forward(x, g, w, pool, True)
        yield lambda dy=dy, x=x, s=saved, g=geometry, w=weights, pool=pool: bottleneck.backward(
            dy, x, s, g, w, pool, True, True
        )
        if pool[0]:
            yield lambda u=u, g=geometry, pool=pool: pooling.forward(u, *g[:2], *pool)
            yield lambda dy=dy, g=geometry, pool=pool: pooling.backward(dy, *g[:2], *pool)


def attention_calls():
    """Attention of one row, one head, one segment, and of pages of one token; the loss over one class."""
    for T, (H, G), width, B, used in itertools.product((1, 17), ((1, 1), (2, 1), (2, 2)), (16, 80), (1, 3), (0, 1)):
        q, k, cu, lengths = empty(T, H, width), empty(T, G, width), integers(B + 1), integers(B) if used else None
        lse = empty(H, T, dtype=FP32)
        for mask in ((None, True), (None, False), (integers(B), True)):
            at = cu, cu, lengths, *mask
            yield lambda q=q, k=k, at=at: flash.forward(q, k, k, *at)
            yield lambda q=q, k=k, lse=lse, at=at: flash.backward(q, q, k, k, q, lse, *at)
        for M, page, rows in itertools.product((1, 40), (1, 16), (1, 9)):
            cached = empty(50, page, G, width)
            yield lambda q=q, c=cached, cu=cu, B=B, M=M, rows=rows: paged.forward(
                q, c, c, cu, integers(B, M), integers(B), rows
            )
    for T, V in itertools.product((1, 17), (1, 2, 33, 5000)):
        yield lambda T=T, V=V: loss_in_place(empty(T, V), integers(T), empty(T, dtype=FP32), True)


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


FAMILIES = (expert_calls, image_calls, layer_calls, block_calls, attention_calls)


def check(calls, device, step=1):
    """Read every step-th of the different launches of these calls."""
    from mm1.autotune.static import specialize

    launches = {}
    for call in calls():
        with recording(device) as recorded:
            call()
        for launch in recorded:
            launches[repr((launch.kernel.fn.__name__, specialize(launch)))] = launch
    assert len(launches) > 20
    for launch in [*launches.values()][::step]:
        read_by_the_front_end(launch, device)


@pytest.mark.parametrize("calls", FAMILIES)
def test_some_launches_have_types(calls):
    check(calls, DEVICES["h200"], step=8)


@pytest.mark.slow
@pytest.mark.parametrize("calls", FAMILIES)
@pytest.mark.parametrize("name", ["h200", "mi300x"])
def test_every_launch_has_types(calls, name):
    check(calls, DEVICES[name])
