"""Compute a language-model head and its cross-entropy in one op, which holds the logits of one chunk of rows at a time.

    loss = Σ_t logsumexp(W x_t) - (W x_t)[target_t],  over t with target ≠ -100
    dx = (softmax - onehot) W,   dW = (softmax - onehot)ᵀ x

x [T, D], weight [V, D], targets int [T] -> scalar fp32. 2·T·D·V operations, and as many for each of the two gradients.
Forward computes the gradients too, from each chunk's logits: no product is computed twice, and backward needs dx and dW
instead of logits [T, V]. dW is accumulated and kept in fp32: before the mean divides, sums over thousands of tokens
exceed fp16. A kernel reads a row of logits twice and overwrites it with its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    autocast_dtype,
    cdiv,
    custom_op,
    expect,
    expect_alike,
    expect_float,
    expect_integers,
    launch,
    power_of_2,
    refuse_second_order,
    wide,
    without_autocast,
)
from mm1.kernels.language import tl, triton

IGNORED = -100  # the target of a token without a loss
_IGNORED = tl.constexpr(IGNORED)
# Bytes of a chunk's logits, enough for 4096 to 8192 tokens: each further chunk reads and writes dW once, which takes a
# CPU as long as the products if chunks have 8 MB.
CHUNK = {"cuda": 512 << 20, "cpu": 128 << 20}
BLOCK = 4096  # logits that a program holds at once


@triton.jit
def _loss_kernel(logits_ptr, targets_ptr, nll_ptr, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Store the loss of one row and, with GRAD, overwrite its logits with their gradient.

    Both are zeros where the target is -100, and NaN where it is neither a class nor -100.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    counts = target != _IGNORED
    valid = (target >= 0) & (target < V)
    tl.device_assert(valid | (target == _IGNORED), "linear_cross_entropy: a target is neither a class nor -100")
    own = tl.load(logits_ptr + row * V + target, valid, other=float("nan")).to(tl.float32)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # not infinite: lanes past V would be NaN
    total = tl.zeros((BLOCK,), tl.float32)
    for v in range(0, V, BLOCK):
        offs = v + tl.arange(0, BLOCK)
        x = tl.where(offs < V, tl.load(logits_ptr + row * V + offs, offs < V).to(tl.float32), -1e30)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(nll_ptr + row, tl.where(counts, lse - own, 0.0))
    if GRAD:
        lse = tl.where(valid, lse, float("nan"))
        for v in range(0, V, BLOCK):
            offs = v + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * V + offs, offs < V, other=0.0).to(tl.float32)
            dx = tl.where(counts, tl.exp(x - lse) - (offs == target).to(tl.float32), 0.0)
            tl.store(logits_ptr + row * V + offs, dx.to(logits_ptr.dtype.element_ty), offs < V)


def loss_in_place(logits: Tensor, targets: Tensor, nll: Tensor, grad: bool) -> None:
    """Store each row's loss in nll [rows]; grad: overwrite logits [rows, V] with their gradient."""
    rows, V = logits.shape
    block = min(BLOCK, power_of_2(V))
    launch(
        _loss_kernel, rows, logits_ptr=logits, targets_ptr=targets, nll_ptr=nll, V=V, GRAD=grad, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def _plain_loss(logits: Tensor, targets: Tensor, nll: Tensor, grad: bool) -> None:
    """Compute `loss_in_place` in plain torch."""
    valid = (targets >= 0) & (targets < logits.shape[1])
    share = valid.to(nll.dtype).masked_fill_(~valid & (targets != IGNORED), float("nan"))
    classes = targets.clamp(0, logits.shape[1] - 1).long()[:, None]
    p = torch.log_softmax(logits.to(nll.dtype), 1)
    nll.copy_(torch.where(valid, -p.gather(1, classes)[:, 0], share))
    if grad:
        p.exp_().scatter_add_(1, classes, p.new_full(classes.shape, -1.0))
        torch.mul(p, share[:, None], out=logits)


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses, dx [T, D] in `dtype` and dW [V, D] in fp32 or wider; unneeded ones have no rows."""
    return _computed(loss_in_place, x, weight, targets, dtype, need_x, need_weight)


def _plain(x, weight, targets, dtype, need_x, need_weight) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `_forward` in plain torch."""
    return _computed(_plain_loss, x, weight, targets, dtype, need_x, need_weight)


def _computed(loss: Callable, x, weight, targets, dtype, need_x, need_weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `_forward`; `loss` computes what `loss_in_place` does."""
    (rows, D), V = x.shape, len(weight)
    if x.device.type == "cpu" and not INTERPRETED:
        wrong = ((targets < 0) | (targets >= V)) & (targets != IGNORED)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"linear_cross_entropy: target of row {row} is {int(targets[row])}, expected "
                             f"0 … {V - 1}, or {IGNORED} for none")  # fmt: skip
    x, w, targets = x.to(dtype), weight.to(dtype), targets.contiguous()
    nll = x.new_empty(rows, dtype=wide(dtype))
    dx = x.new_empty(rows if need_x else 0, D)
    dw = x.new_zeros(V if need_weight and not rows else 0, D, dtype=wide(dtype))
    # All chunks are of one size: a last one of few rows would be slow.
    chunks = cdiv(rows * V * x.itemsize, CHUNK["cpu" if x.device.type == "cpu" else "cuda"])
    step = cdiv(rows, max(chunks, 1))
    for begin in range(0, rows, max(step, 1)):
        part = slice(begin, begin + step)
        logits = torch.mm(x[part], w.t())
        loss(logits, targets[part], nll[part], need_x or need_weight)
        if need_x:
            torch.mm(logits, w, out=dx[part])
        if need_weight and begin == 0:
            dw = wide_product(logits.t(), x[part])
        elif need_weight and dtype == dw.dtype:
            dw.addmm_(logits.t(), x[part])
        elif need_weight:
            dw += wide_product(logits.t(), x[part])
    return nll.sum(), dx, dw


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b in fp32 or wider; a CPU rounds sums of bf16 to bf16, whose range suffices."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float()) if a.dtype == torch.float16 else torch.mm(a, b).to(wide(a.dtype))


_op = custom_op("linear_cross_entropy", without_autocast(_forward), _plain)


@_op.register_fake
def _(x, weight, targets, dtype, need_x, need_weight):
    return (
        x.new_empty((), dtype=wide(dtype)),
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1], dtype=dtype),
        x.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1], dtype=wide(dtype)),
    )


@torch.library.custom_op("mm1::linear_cross_entropy_backward", mutates_args=())
def _scaled(
    scale: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return scale · dx in `dtype` and scale · dw in `weight_dtype`.

    The products are computed in fp32: a scale rounded to bf16 would change all values by up to 0.4 % in one direction.
    """
    return (dx.to(dw.dtype) * scale).to(dtype), (dw * scale).to(weight_dtype)


@_scaled.register_fake
def _(scale, dx, dw, dtype, weight_dtype):
    return dx.new_empty(dx.shape, dtype=dtype), dw.new_empty(dw.shape, dtype=weight_dtype)


refuse_second_order(_scaled, "linear_cross_entropy")


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def _gradients(ctx, scale, *_):
    if scale is None:
        return (None,) * 6
    dx, dw = _scaled(scale, *ctx.saved_tensors, *ctx.dtypes)
    need_x, need_weight = ctx.needs_input_grad[:2]
    return dx if need_x else None, dw if need_weight else None, *(None,) * 4


_op.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of x · weightᵀ and the targets, a scalar of fp32 (fp64 for fp64).

    x [T, D] and weight [V, D] in fp32, bf16 or fp16, on a CPU also fp64; targets int [T] in 0 … V - 1, or -100 for no
    loss. reduction: "mean" over the targets that are not -100, or "sum". Any other target raises ValueError on a CPU;
    on a GPU loss and gradients become NaN, and with TRITON_DEBUG=1 a device assertion fails. Without any target the
    loss is 0, and so are its gradients. Products are computed in autocast's dtype, or in the weight's without autocast;
    the weight's gradient is accumulated in fp32. Only the gradients of x and weight that are needed are computed.
    Gradients of gradients and forward-mode derivatives raise RuntimeError; other shapes, dtypes or devices raise
    ValueError.
    """
    op = "linear_cross_entropy"
    expect_alike(op, x=x, weight=weight, targets=targets)
    expect(x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1], op, "weight", tuple(weight.shape),
           ["V", x.shape[-1]])  # fmt: skip
    expect(targets.shape == x.shape[:1], op, "targets", tuple(targets.shape), tuple(x.shape[:1]))
    expect_float(op, "x", x)
    expect_float(op, "weight", weight)
    expect_integers(op, "targets", targets, 1)
    expect(reduction in ("mean", "sum"), op, "reduction", reduction, ("mean", "sum"))
    dtype = autocast_dtype(weight) or weight.dtype
    need_x, need_weight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    total = _op(x, weight, targets, dtype, need_x, need_weight)[0]
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def cost(tokens: int, width: int, vocabulary: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of linear_cross_entropy; backward: of the gradients alone, from saved logits.

    tokens: number of tokens with a target.
    """
    once = (tokens + vocabulary) * width * itemsize
    if backward:
        return Cost(4 * tokens * width * vocabulary, 2 * once)
    return Cost(2 * tokens * width * vocabulary, once + 4 * tokens)
