"""conv_block and adaptive_pool on CPU: neighbours of one size are a batch of torch's channels-last convolution.

Forward's products are oneDNN's 1×1 convolutions of all patches at once: 92 ms where MKL's product took 104 (5832 × 1024
× 1024, two threads), a whole C-Abstractor 7 % faster; backward's are MKL's. bf16 and fp16 are computed in fp32: CPUs
without units for them multiply them 200 times slower. fp64 stays fp64. Formulas: conv_block.py.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import expect, wide

EPS = 1e-5
STRETCH = 1 << 20  # values of scratch, 4 MB: of 1 MB two threads wait for each other too often, 16 MB leave the cache
aten = torch.ops.aten


def runs(table: Tensor, op: str) -> list[tuple[int, int, int, int, int]]:
    """Neighbours of one size: first image, images, first row, h, w."""
    found: list[tuple[int, int, int, int, int]] = []
    for i, (first, rows, h, w) in enumerate(table.tolist()):
        if rows == 0:
            continue
        expect(rows == h * w, op, f"patches of image {i}", rows, h * w)
        image, n, start, *size = found[-1] if found else (0, 0, 0, 0, 0)
        if n and size == [h, w] and image + n == i and start + n * h * w == first:
            found[-1] = (image, n + 1, start, h, w)
        else:
            found.append((i, 1, first, h, w))
    return found


def batch(x: Tensor, run: tuple[int, int, int, int, int]) -> Tensor:
    """The run's rows of x as [n, C, h, w], channels last."""
    _, n, first, h, w = run
    return x[first : first + n * h * w].view(n, h, w, -1).permute(0, 3, 1, 2)


def pool(x: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    y = x.new_zeros(len(table), oh, ow, x.shape[1])
    for run in runs(table, "adaptive_pool"):
        image, n, *_ = run
        y[image : image + n] = F.adaptive_avg_pool2d(batch(x, run).to(wide(x.dtype)), (oh, ow)).permute(0, 2, 3, 1)
    return y.view(len(table) * oh * ow, x.shape[1])


def pool_backward(dy: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    dx, dy = dy.new_zeros(len(owner), dy.shape[1]), dy.contiguous().view(len(table), oh, ow, dy.shape[1])
    for run in runs(table, "adaptive_pool"):
        image, n, *_ = run
        into, d = batch(dx, run), dy[image : image + n].permute(0, 3, 1, 2)
        exact = torch.empty_like(into, dtype=wide(dy.dtype))
        into.copy_(aten._adaptive_avg_pool2d_backward(d.to(exact.dtype), exact))
    return dx


def _stretches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(STRETCH // max(tensors[0].shape[1], 1), 1)
    return zip(*(t.split(rows) for t in tensors))


def _norm(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(u, u.shape[-1:], gamma, beta, EPS)


def _norm_silu(u: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> Tensor:
    for part, into in _stretches(u, out):
        aten.silu.out(_norm(part, gamma, beta), out=into)
    return out


def _norm_silu_backward(da: Tensor, u: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """du, in da's memory, and [2, C] of gamma and beta."""
    sums = u.new_zeros(2, u.shape[1])
    for d, part in _stretches(da, u):
        z, mean, rstd = torch.native_layer_norm(part, u.shape[1:], gamma, beta, EPS)
        dz = aten.silu_backward.grad_input(d, z, grad_input=z)
        _norm_backward(dz, part, mean, rstd, gamma, beta, d, sums[0], sums[1])
    return da, sums


def _norm_backward(dz, u, mean, rstd, gamma, beta, du, dgamma, dbeta) -> None:
    """du = …, dgamma += …, dbeta += …"""
    grads = aten.native_layer_norm_backward(dz, u, u.shape[1:], mean, rstd, gamma, beta, [True, True, True])
    du.copy_(grads[0])
    dgamma += grads[1]
    dbeta += grads[2]


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x [P, K] · wᵀ, w [C, K] -> [P, C]."""
    if x.numel() == 0:
        return torch.mm(x, w.t())
    y = F.conv2d(x.view(1, 1, len(x), -1).permute(0, 3, 1, 2), w.view(*w.shape, 1, 1))
    return y.permute(0, 2, 3, 1).reshape(len(x), len(w))


def _wide(*tensors: Tensor | None) -> list:
    return [None if t is None else t.to(wide(t.dtype)) for t in tensors]


def _conv(a: Tensor, w: Tensor, found: Sequence[tuple]) -> Tensor:
    """Depthwise 3×3 with w [C, 9]; zeros in rows of no image."""
    C = a.shape[1]
    u = _rows_like(a, found)
    for run in found:
        batch(u, run).copy_(F.conv2d(batch(a, run), w.view(C, 1, 3, 3), padding=1, groups=C))
    return u


def _rows_like(x: Tensor, found: Sequence[tuple]) -> Tensor:
    """As torch.empty_like, but zeros where there are rows of no image."""
    whole = sum(n * h * w for _, n, _, h, w in found) == len(x)
    return torch.empty_like(x) if whole else torch.zeros_like(x)


def _gate(b: Tensor, gate: Tensor, found: Sequence[tuple]) -> None:
    for image, n, first, h, w in found:
        b[first : first + n * h * w].view(n, h * w, -1).mul_(gate[image : image + n, None])


def forward(
    x: Tensor, table: Tensor, owner: Tensor, strips: Tensor, w1: Tensor, g1: Tensor, b1: Tensor, w2: Tensor,
    g2: Tensor, b2: Tensor, f1: Tensor, c1: Tensor, f2: Tensor, c2: Tensor, w3: Tensor, g3: Tensor, b3: Tensor,
    wd: Tensor | None, gd: Tensor | None, bd: Tensor | None, oh: int, ow: int, keep: bool,
) -> list[Tensor]:  # fmt: skip
    dtype, found = x.dtype, runs(table, "conv_block")
    given = _wide(x, w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd)
    x, w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd = given
    u1 = _product(x, w1)
    a = _norm_silu(u1, g1, b1, torch.empty_like(u1) if keep else u1)
    u2 = _conv(a, w2, found)
    b = _norm_silu(u2, g2, b2, u2)
    mean = b.new_zeros(len(table), b.shape[1])
    for image, n, first, h, w in found:
        part = b[first : first + n * h * w].view(n, h * w, -1)
        torch.bmm(part.new_full((n, 1, h * w), 1 / (h * w)), part, out=mean[image : image + n, None])
    hidden = torch.addmm(c1, mean, f1.t())
    gate = torch.sigmoid_(torch.addmm(c2, F.silu(hidden), f2.t()))
    _gate(b, gate, found)
    u3 = _product(b, w3)
    v = x.new_empty(0) if wd is None else _product(x, wd)
    y = _rows_like(u3, found)
    for _, n, first, h, w in found:
        rows = slice(first, first + n * h * w)
        for u, s, into in _stretches(u3[rows], x[rows] if wd is None else v[rows], y[rows]):
            shortcut = s if gd is None or bd is None else _norm(s, gd, bd)
            aten.silu.out(_norm(u, g3, b3).add_(shortcut), out=into)
    if oh:
        y = pool(y, table, owner, oh, ow)
    saved = (u1, u3, v, gate, hidden, mean) if keep else [x.new_empty(0) for _ in range(6)]
    return [t.to(dtype) for t in (y, *saved)]


def backward(
    dy: Tensor, x: Tensor, u1: Tensor, u3: Tensor, v: Tensor, gate: Tensor, hidden: Tensor, mean: Tensor,
    table: Tensor, owner: Tensor, strips: Tensor, w1: Tensor, g1: Tensor, b1: Tensor, w2: Tensor, g2: Tensor,
    b2: Tensor, f1: Tensor, c1: Tensor, f2: Tensor, c2: Tensor, w3: Tensor, g3: Tensor, b3: Tensor,
    wd: Tensor | None, gd: Tensor | None, bd: Tensor | None, oh: int, ow: int, inputs: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    weights_given = (w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd)
    dtype, found = x.dtype, runs(table, "conv_block")
    x, u1, u3, v, gate, hidden, mean = _wide(x, u1, u3, v, gate, hidden, mean)
    w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd = _wide(*weights_given)
    (dy,) = _wide(dy.contiguous())
    if oh:
        dy = pool_backward(dy, table, owner, oh, ow)
    C = u1.shape[1]
    du3, ds, sums3 = _rows_like(u3, found), _rows_like(u3, found), u3.new_zeros(4, C)
    for _, n, first, h, w in found:
        rows = slice(first, first + n * h * w)
        for d, u, s, du, dx in _stretches(dy[rows], u3[rows], x[rows] if wd is None else v[rows], du3[rows], ds[rows]):
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
    u2 = _conv(a, w2, found)
    b = _norm_silu(u2, g2, b2, torch.empty_like(u2))
    dgate = torch.zeros_like(gate)
    for image, n, first, h, w in found:
        for i in range(n):
            rows = slice(first + i * h * w, first + (i + 1) * h * w)
            for p, q in _stretches(b[rows], dc[rows]):
                dgate[image + i] += (p * q).sum(0)
    dz = aten.sigmoid_backward(dgate, gate)
    dhidden = aten.silu_backward(torch.mm(dz, f2), hidden)
    dmean = torch.mm(dhidden, f1)
    for image, n, first, h, w in found:
        part, images = dc[first : first + n * h * w].view(n, h * w, C), slice(image, image + n)
        part.mul_(gate[images, None]).add_(dmean[images, None], alpha=1 / (h * w))
    du2, sums2 = _norm_silu_backward(dc, u2, g2, b2)
    da, dw2 = _rows_like(a, found), w2.new_zeros(C, 1, 3, 3)
    kernel = w2.view(C, 1, 3, 3)
    for run in found:
        d = batch(du2, run)
        batch(da, run).copy_(F.conv2d(d, kernel.flip(2, 3), padding=1, groups=C))
        if weights:
            one = [1, 1]
            dw2 += aten.convolution_backward(
                d, batch(a, run), kernel, None, one, one, one, False, [0, 0], C, [False, True, False]
            )[1]
    du1, sums1 = _norm_silu_backward(da, u1, g1, b1)
    dx = x.new_empty(0)
    if weights:  # before dx takes over the memory of ds
        _gate(b, gate, found)
        grads = [
            torch.mm(du1.t(), x), *sums1, dw2.view(C, 9), *sums2, torch.mm(dhidden.t(), mean), dhidden.sum(0),
            torch.mm(dz.t(), F.silu(hidden)), dz.sum(0), torch.mm(du3.t(), b), sums3[0], sums3[1],
            *((x.new_empty(0),) * 3 if wd is None else (torch.mm(ds.t(), x), sums3[2], sums3[3])),
        ]  # fmt: skip
    else:
        grads = [x.new_empty(0) for _ in weights_given]
    if inputs:
        dx = ds.addmm_(du1, w1) if wd is None else torch.mm(du1, w1).addmm_(ds, wd)
    kinds = [dtype if w is None or not weights else w.dtype for w in weights_given]
    return [dx.to(dtype), *(g.to(kind, copy=True) for g, kind in zip(grads, kinds))]
