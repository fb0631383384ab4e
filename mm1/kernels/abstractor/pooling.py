"""Pool packed images of any grids to one common grid by adaptive averages.

    y[n, i, j] = mean of x over rows floor(i·h/oh) … ceil((i+1)·h/oh) - 1 and columns likewise, of image n

x [P, C] -> [N·oh·ow, C]. The windows are those of torch.nn.AdaptiveAvgPool2d: they overlap where h is no multiple of
oh, and repeat where h < oh. Reads P·C, writes N·oh·ow·C. Backward is a gather without atomics, so that every run gives
the same bits: row r is in the windows floor(r·oh/h) … ceil((r+1)·oh/h) - 1.
"""

from collections.abc import Sequence

from torch import Tensor

from mm1.kernels.abstractor import cpu
from mm1.kernels.abstractor.rows import config_of, gathered, over_rows, window_of
from mm1.kernels.dispatch import (
    Cost,
    cdiv,
    custom_op,
    expect,
    expect_alike,
    expect_float,
    launch,
    power_of_2,
    refuse_second_order,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.patches.grids import Grids, as_grids, image_of

POOL = over_rows("adaptive_pool", 2, 3, False)


@triton.jit
def _pool_kernel(
    x_ptr, table_ptr, y_ptr, C, OH: tl.constexpr, OW: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the average of one window of an image."""
    place = tl.program_id(0)
    first, rows, w, top, left, columns, count = window_of(table_ptr, place, OH, OW)
    offs_c = tl.arange(0, BLOCK_C)
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, count, ROWS):
        k = start + tl.arange(0, ROWS)
        at = (top + k // columns) * w + left + k % columns
        inside = ((k < count) & (at < rows))[:, None] & (offs_c < C)[None, :]
        acc += tl.load(x_ptr + (first + at).to(tl.int64)[:, None] * C + offs_c[None, :], inside, other=0.0)
    y = tl.sum(acc, 0) / tl.maximum(count, 1)
    tl.store(y_ptr + place.to(tl.int64) * C + offs_c, y.to(y_ptr.dtype.element_ty), offs_c < C)


@triton.jit
def _pool_backward_kernel(
    dy_ptr, owner_ptr, table_ptr, dx_ptr, P, C, OH: tl.constexpr, OW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    in_c = (offs_c < C)[None, :]
    image, first, h, w, valid = image_of(owner_ptr, table_ptr, rows, P)
    dx = gathered(dy_ptr, image, rows - first, h, w, valid, offs_c, C, OH, OW)
    places = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), (rows < P)[:, None] & in_c)


def forward(x: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Pool x [P, C] -> [N·oh·ow, C]."""
    C, y = x.shape[1], x.new_empty(len(table) * oh * ow, x.shape[1])
    config = config_of(POOL, x)
    if C:
        launch(
            _pool_kernel, len(y), x_ptr=x, table_ptr=table, y_ptr=y, C=C, OH=oh, OW=ow, ROWS=config.rows,
            BLOCK_C=power_of_2(C), num_warps=config.warps,
        )  # fmt: skip
    return y


def backward(dy: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Return the gradient [P, C] of the pooled tensor."""
    P, C = len(owner), dy.shape[1]
    if not dy.numel():
        return dy.new_zeros(P, C)
    dx = dy.new_empty(P, C)
    config = config_of(POOL, dx)
    launch(
        _pool_backward_kernel, cdiv(P, config.rows), dy_ptr=dy.contiguous(), owner_ptr=owner, table_ptr=table,
        dx_ptr=dx, P=P, C=C, OH=oh, OW=ow, ROWS=config.rows, BLOCK_C=power_of_2(C), num_warps=config.warps,
    )  # fmt: skip
    return dx


_forward = custom_op("adaptive_pool", forward, cpu.pool)
_backward = custom_op("adaptive_pool_backward", backward, cpu.pool_backward)
_forward.register_fake(lambda x, table, owner, oh, ow: x.new_empty(table.shape[0] * oh * ow, x.shape[1]))
_backward.register_fake(lambda dy, table, owner, oh, ow: dy.new_empty(owner.shape[0], dy.shape[1]))


def _save(ctx, inputs, output):
    _, *geometry, ctx.oh, ctx.ow = inputs
    ctx.save_for_backward(*geometry)


def _gradients(ctx, dy: Tensor):
    return _backward(dy, *ctx.saved_tensors, ctx.oh, ctx.ow), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "adaptive_pool")


def adaptive_pool(x: Tensor, grids: "Grids | Sequence[tuple[int, int]]", out: tuple[int, int] = (12, 12)) -> Tensor:
    """Return the averages of out = (oh, ow) windows of each image of x [P, C], [N·oh·ow, C] in x's dtype.

    grids: the images' (h, w), or Grids; an absent image gives zeros. The windows are those of
    torch.nn.AdaptiveAvgPool2d. x is fp32, bf16 or fp16, on a CPU also fp64, and has a gradient; it is summed in fp32,
    or in fp64. Raises ValueError for other shapes or dtypes, TypeError for an x that is no tensor.
    """
    expect_alike("adaptive_pool", x=x)
    grids = as_grids(grids, x.device)
    expect(x.ndim == 2 and x.shape[0] == grids.patches, "adaptive_pool", "x", tuple(x.shape), [grids.patches, "C"])
    expect_float("adaptive_pool", "x", x)
    expect(min(out) > 0, "adaptive_pool", "out", out, "positive sides")
    expect(grids.merge == 1, "adaptive_pool", "merge of grids", grids.merge, 1)
    return _forward(x.contiguous(), grids.table, grids.owner, *out)


def cost(patches: int, images: int, channels: int, out: tuple[int, int] = (12, 12), *, itemsize: int = 2) -> Cost:
    """Return the cost of forward; backward costs the same."""
    places = images * out[0] * out[1]
    return Cost(max(patches, places) * channels, (patches + places) * channels * itemsize)
