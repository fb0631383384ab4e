"""Compute conv_block and adaptive_pool on a CPU: neighbouring images of one size are a batch of torch's convolutions.

Forward's products are oneDNN's 1×1 convolutions of all patches at once: 92 ms where MKL's product took 104 (5832 × 1024
× 1024, two threads), which makes a whole C-Abstractor 7 % faster; backward's are MKL's. bf16 and fp16 are computed in
fp32: CPUs without units for them multiply them 200 times slower. fp64 stays fp64. Formulas: bottleneck.py.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import expect, wide

EPS = 1e-5
CHUNK = 1 << 20  # values computed at once, 4 MB: with 1 MB two threads wait too often, 16 MB exceed the cache
aten = torch.ops.aten


def runs(table: Tensor, op: str) -> list[tuple[int, int, int, int, int]]:
    """Return the runs of neighbouring images of one size: first image, images, first row, h, w.

    Raises ValueError for an image of which some patches are missing.
    """
    result: list[tuple[int, int, int, int, int]] = []
    for i, (first, rows, h, w) in enumerate(table.tolist()):
        if rows == 0:
            continue
        expect(rows == h * w, op, f"patches of image {i}", rows, h * w)
        image, n, start, *size = result[-1] if result else (0, 0, 0, 0, 0)
        if n and size == [h, w] and image + n == i and start + n * h * w == first:
            result[-1] = (image, n + 1, start, h, w)
        else:
            result.append((i, 1, first, h, w))
    return result


def batch(x: Tensor, run: tuple[int, int, int, int, int]) -> Tensor:
    """View the run's rows of x as [n, C, h, w], channels last."""
    _, n, first, h, w = run
    return x[first : first + n * h * w].view(n, h, w, -1).permute(0, 3, 1, 2)


def pool(x: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Pool x [P, C] -> [N·oh·ow, C]."""
    y = x.new_zeros(len(table), oh, ow, x.shape[1])
    for run in runs(table, "adaptive_pool"):
        image, n, *_ = run
        y[image : image + n] = F.adaptive_avg_pool2d(batch(x, run).to(wide(x.dtype)), (oh, ow)).permute(0, 2, 3, 1)
    return y.view(len(table) * oh * ow, x.shape[1])


def pool_backward(dy: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Return the gradient [P, C] of the pooled tensor."""
    dx, dy = dy.new_zeros(len(owner), dy.shape[1]), dy.contiguous().view(len(table), oh, ow, dy.shape[1])
    for run in runs(table, "adaptive_pool"):
        image, n, *_ = run
        into, d = batch(dx, run), dy[image : image + n].permute(0, 3, 1, 2)
        exact = torch.empty_like(into, dtype=wide(dy.dtype))
        into.copy_(aten._adaptive_avg_pool2d_backward(d.to(exact.dtype), exact))
    return dx


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors into the same chunks of rows."""
    rows = max(CHUNK // max(tensors[0].shape[1], 1), 1)
    return zip(*(t.split(rows) for t in tensors))


def _norm(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(u, u.shape[-1:], gamma, beta, EPS)


def _norm_silu(u: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> Tensor:
    for part, into in _chunks(u, out):
        aten.silu.out(_norm(part, gamma, beta), out=into)
    return out


def _norm_silu_backward(da: Tensor, u: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return du, in da's memory, and the gradients [2, C] of gamma and beta."""
    sums = u.new_zeros(2, u.shape[1])
    for d, part in _chunks(da, u):
        z, mean, rstd = torch.native_layer_norm(part, u.shape[1:], gamma, beta, EPS)
        dz = aten.silu_backward.grad_input(d, z, grad_input=z)
        _norm_backward(dz, part, mean, rstd, gamma, beta, d, sums[0], sums[1])
    return da, sums


def _norm_backward(dz, u, mean, rstd, gamma, beta, du, dgamma, dbeta) -> None:
    """Store du; add to dgamma and dbeta."""
    grads = aten.native_layer_norm_backward(dz, u, u.shape[1:], mean, rstd, gamma, beta, [True, True, True])
    du.copy_(grads[0])
    dgamma += grads[1]
    dbeta += grads[2]


def _product(x: Tensor, w: Tensor) -> Tensor:
    """Return x [P, K] · wᵀ, w [C, K], -> [P, C]."""
    if x.numel() == 0:
        return torch.mm(x, w.t())
    y = F.conv2d(x.view(1, 1, len(x), -1).permute(0, 3, 1, 2), w.view(*w.shape, 1, 1))
    return y.permute(0, 2, 3, 1).reshape(len(x), len(w))


def _wide(*tensors: Tensor | None) -> list:
    """Convert half precision to fp32."""
    return [None if t is None else t.to(wide(t.dtype)) for t in tensors]


def _conv(a: Tensor, w: Tensor, images: Sequence[tuple]) -> Tensor:
    """Convolve depthwise, 3×3, with w [C, 9]; zeros in rows of no image."""
    C = a.shape[1]
    u = _rows_like(a, images)
    for run in images:
        batch(u, run).copy_(F.conv2d(batch(a, run), w.view(C, 1, 3, 3), padding=1, groups=C))
    return u


def _rows_like(x: Tensor, images: Sequence[tuple]) -> Tensor:
    """Allocate a tensor like x: empty, or zeros if there are rows of no image."""
    whole = sum(n * h * w for _, n, _, h, w in images) == len(x)
    return torch.empty_like(x) if whole else torch.zeros_like(x)


def _gate(b: Tensor, gate: Tensor, images: Sequence[tuple]) -> None:
    """Multiply b in place by its image's gate."""
    for image, n, first, h, w in images:
        b[first : first + n * h * w].view(n, h * w, -1).mul_(gate[image : image + n, None])


def forward(
    x: Tensor, geometry: Sequence[Tensor], weights: Sequence[Tensor], size: Sequence[int], keep: bool
) -> list[Tensor]:
    """Return y and what backward needs; see bottleneck.forward."""
    (table, owner, _), (oh, ow), dtype = geometry, size, x.dtype
    images = runs(table, "conv_block")
    x, w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, *down = _wide(x, *weights)
    wd, gd, bd = down or (None, None, None)
    u1 = _product(x, w1)
    a = _norm_silu(u1, g1, b1, torch.empty_like(u1) if keep else u1)
    u2 = _conv(a, w2, images)
    b = _norm_silu(u2, g2, b2, u2)
    mean = b.new_zeros(len(table), b.shape[1])
    for image, n, first, h, w in images:
        part = b[first : first + n * h * w].view(n, h * w, -1)
        torch.bmm(part.new_full((n, 1, h * w), 1 / (h * w)), part, out=mean[image : image + n, None])
    hidden = torch.addmm(c1, mean, f1.t())
    gate = torch.sigmoid_(torch.addmm(c2, F.silu(hidden), f2.t()))
    _gate(b, gate, images)
    u3 = _product(b, w3)
    v = x.new_empty(0) if wd is None else _product(x, wd)
    y = _rows_like(u3, images)
    for _, n, first, h, w in images:
        rows = slice(first, first + n * h * w)
        for u, s, into in _chunks(u3[rows], x[rows] if wd is None else v[rows], y[rows]):
            shortcut = s if gd is None or bd is None else _norm(s, gd, bd)
            aten.silu.out(_norm(u, g3, b3).add_(shortcut), out=into)
    if oh:
        y = pool(y, table, owner, oh, ow)
    saved = (u1, u3, v, gate, hidden, mean) if keep else [x.new_empty(0) for _ in range(6)]
    return [t.to(dtype) for t in (y, *saved)]


def backward(
    dy: Tensor, x: Tensor, saved: Sequence[Tensor], geometry: Sequence[Tensor], weights: Sequence[Tensor],
    size: Sequence[int], need_x: bool, need_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x and of all weights; see bottleneck.backward."""
    (table, owner, _), (oh, ow), dtype = geometry, size, x.dtype
    images = runs(table, "conv_block")
    dy, x, u1, u3, v, gate, hidden, mean = _wide(dy.contiguous(), x, *saved)
    w1, g1, b1, w2, g2, b2, f1, _, f2, _, w3, g3, b3, *down = _wide(*weights)
    wd, gd, bd = down or (None, None, None)
    if oh:
        dy = pool_backward(dy, table, owner, oh, ow)
    C = u1.shape[1]
    du3, ds, sums3 = _rows_like(u3, images), _rows_like(u3, images), u3.new_zeros(4, C)
    for _, n, first, h, w in images:
        rows = slice(first, first + n * h * w)
        for d, u, s, du, dx in _chunks(dy[rows], u3[rows], x[rows] if wd is None else v[rows], du3[rows], ds[rows]):
            z, m, r = torch.native_layer_norm(u, [C], g3, b3, EPS)
            shortcut = (s,) if wd is None else torch.native_layer_norm(s, [C], gd, bd, EPS)
            aten.silu_backward.grad_input(d, z.add_(shortcut[0]), grad_input=z)
            _norm_backward(z, u, m, r, g3, b3, du, sums3[0], sums3[1])
            if wd is None:
                dx.copy_(z)
            else:
                _norm_backward(z, s, shortcut[1], shortcut[2], gd, bd, dx, sums3[2], sums3[3])
    dc = torch.mm(du3, w3)
    a = _norm_silu(u1, g1, b1, torch.empty_like(u1))
    u2 = _conv(a, w2, images)
    b = _norm_silu(u2, g2, b2, torch.empty_like(u2))
    dgate = torch.zeros_like(gate)
    for image, n, first, h, w in images:
        for i in range(n):
            rows = slice(first + i * h * w, first + (i + 1) * h * w)
            for p, q in _chunks(b[rows], dc[rows]):
                dgate[image + i] += (p * q).sum(0)
    dz = aten.sigmoid_backward(dgate, gate)
    dhidden = aten.silu_backward(torch.mm(dz, f2), hidden)
    dmean = torch.mm(dhidden, f1)
    for image, n, first, h, w in images:
        part, own = dc[first : first + n * h * w].view(n, h * w, C), slice(image, image + n)
        part.mul_(gate[own, None]).add_(dmean[own, None], alpha=1 / (h * w))
    du2, sums2 = _norm_silu_backward(dc, u2, g2, b2)
    da, dw2 = _rows_like(a, images), w2.new_zeros(C, 1, 3, 3)
    kernel = w2.view(C, 1, 3, 3)
    for run in images:
        d = batch(du2, run)
        batch(da, run).copy_(F.conv2d(d, kernel.flip(2, 3), padding=1, groups=C))
        if need_weights:
            one = [1, 1]
            dw2 += aten.convolution_backward(
                d, batch(a, run), kernel, None, one, one, one, False, [0, 0], C, [False, True, False]
            )[1]
    du1, sums1 = _norm_silu_backward(da, u1, g1, b1)
    dx = x.new_empty(0)
    if need_weights:  # before dx overwrites ds
        _gate(b, gate, images)
        grads = [
            torch.mm(du1.t(), x), *sums1, dw2.view(C, 9), *sums2, torch.mm(dhidden.t(), mean), dhidden.sum(0),
            torch.mm(dz.t(), F.silu(hidden)), dz.sum(0), torch.mm(du3.t(), b), sums3[0], sums3[1],
            *(() if wd is None else (torch.mm(ds.t(), x), sums3[2], sums3[3])),
        ]  # fmt: skip
    else:
        grads = [x.new_empty(0) for _ in weights]
    if need_x:
        dx = ds.addmm_(du1, w1) if wd is None else torch.mm(du1, w1).addmm_(ds, wd)
    return [dx.to(dtype), *(g.to(w.dtype if need_weights else dtype, copy=True) for g, w in zip(grads, weights))]
