"""Language-model head and cross-entropy in one op; of the logits only some rows exist at a time.

    loss = Σ_t logsumexp(W x_t) - (W x_t)[target_t],  over t with target ≠ -100
    dx = (softmax - onehot) W,   dW = (softmax - onehot)ᵀ x

x [T, D], weight [V, D], targets int [T] -> scalar fp32. 2·T·D·V operations, and 4·T·D·V for the gradients, which are
computed beside the loss while a chunk's logits are there: no product is made twice, and what waits for backward is dx
and dW, not [T, V]. A kernel reads a row of logits twice and leaves their gradient in its place.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mm1.kernels.dispatch import Cost, cdiv, expect, launch, on_cpu, power_of_2
from mm1.kernels.language import tl, triton

IGNORED = -100
# Bytes of logits at a time. What the targets of 4096 to 8192 tokens need is one chunk: every chunk more reads and
# writes dW once, which costs a CPU as much as its products where they are chunks of 8 MB.
CHUNK = {"cuda": 512 << 20, "cpu": 128 << 20}
BLOCK = 4096  # logits a program holds at once
WIDE = (torch.float32, torch.float64)


@triton.jit
def _loss_kernel(logits_ptr, targets_ptr, nll_ptr, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One row. Logits become gradients of the loss, zeros where there is no target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    own = tl.load(logits_ptr + row * V + target, counts, other=0.0).to(tl.float32)
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
        for v in range(0, V, BLOCK):
            offs = v + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * V + offs, offs < V, other=0.0).to(tl.float32)
            dx = tl.where(counts, tl.exp(x - lse) - (offs == target).to(tl.float32), 0.0)
            tl.store(logits_ptr + row * V + offs, dx.to(logits_ptr.dtype.element_ty), offs < V)


def _loss(logits: Tensor, targets: Tensor, nll: Tensor, grad: bool) -> None:
    rows, V = logits.shape
    block = min(BLOCK, power_of_2(V))
    launch(_loss_kernel, rows, logits, targets, nll, V, grad, block, num_warps=max(1, min(8, block // 256)))


def _loss_cpu(logits: Tensor, targets: Tensor, nll: Tensor, grad: bool) -> None:
    there, at = targets != IGNORED, targets.clamp(min=0).long()[:, None]
    p = torch.log_softmax(logits.to(nll.dtype), 1)
    nll.copy_(torch.where(there, -p.gather(1, at)[:, 0], 0))
    if grad:
        p.exp_().scatter_add_(1, at, p.new_full(at.shape, -1.0))
        torch.mul(p, there[:, None], out=logits)


def _forward(
    loss: Callable[[Tensor, Tensor, Tensor, bool], None], x: Tensor, weight: Tensor, targets: Tensor,
    dtype: torch.dtype, grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, dx [T, D] in `dtype` and dW [V, D] like the weight; without `grad` these two are empty."""
    rows, V = len(x), len(weight)
    x, w = x.to(dtype), weight.to(dtype)
    nll = x.new_empty(rows, dtype=torch.promote_types(dtype, torch.float32))
    dx = x.new_empty(x.shape if grad else (0, x.shape[1]))
    dw = weight.new_zeros(weight.shape if grad and not rows else (0, weight.shape[1]))
    # Chunks of one size, so that no last one of few rows is slow.
    chunks = cdiv(rows * V * x.itemsize, CHUNK[x.device.type])
    step = cdiv(rows, max(chunks, 1))
    for begin in range(0, rows, max(step, 1)):
        part = slice(begin, begin + step)
        logits = torch.mm(x[part], w.t())
        loss(logits, targets[part], nll[part], grad)
        if not grad:
            continue
        torch.mm(logits, w, out=dx[part])
        if begin == 0:
            dw = torch.mm(logits.t(), x[part]).to(weight.dtype)
        elif dw.dtype == dtype:
            dw.addmm_(logits.t(), x[part])
        else:
            dw += torch.mm(logits.t(), x[part])
    return nll.sum(), dx, dw


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_loss, x, weight, targets, dtype, grad)


def forward_cpu(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_loss_cpu, x, weight, targets, dtype, grad)


_op = torch.library.custom_op("mm1::linear_cross_entropy", forward, mutates_args=())
on_cpu(_op, forward_cpu)


@_op.register_fake
def _(x, weight, targets, dtype, grad):
    return (
        x.new_empty((), dtype=torch.promote_types(dtype, torch.float32)),
        x.new_empty(x.shape if grad else (0, x.shape[1]), dtype=dtype),
        weight.new_empty(weight.shape if grad else (0, weight.shape[1])),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _gradients(ctx, scale, *_):
    dx, dw = ctx.saved_tensors
    return (dx * scale).to(ctx.dtype), (dw * scale).to(dw.dtype), None, None, None


_op.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """x [T, D], weight [V, D], targets int [T] with -100 for no loss -> fp32 [].

    reduction: "mean" over targets, or "sum". Products run in the dtype of autocast where that is on, else in that of
    the weight; a weight of fp32 gets gradients of fp32. Without any target the loss is 0, and so are its gradients. No
    gradients of gradients.
    """
    expect(x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1], "linear_cross_entropy", "weight",
           tuple(weight.shape), f"[V, {x.shape[-1]}]")  # fmt: skip
    expect(targets.shape == x.shape[:1], "linear_cross_entropy", "targets", tuple(targets.shape), tuple(x.shape[:1]))
    expect(reduction in ("mean", "sum"), "linear_cross_entropy", "reduction", reduction, ("mean", "sum"))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total = _op(x, weight, targets, dtype, grad)[0]
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def cost(tokens: int, width: int, vocabulary: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """tokens: those with a target. backward: of the gradients alone, with the logits kept."""
    once = (tokens + vocabulary) * width * itemsize
    if backward:
        return Cost(4 * tokens * width * vocabulary, 2 * once)
    return Cost(2 * tokens * width * vocabulary, once + 4 * tokens)
