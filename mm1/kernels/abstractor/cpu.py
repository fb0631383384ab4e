"""Compute conv_block and adaptive_pool on a CPU: neighbouring images of one size are a batch of torch's convolutions.

The products of forward are oneDNN's 1×1 convolutions of all patches at once: 92 ms where MKL's product took 104 (5832 ×
1024 × 1024, two threads), which makes a whole C-Abstractor 7 % faster. Those of backward are MKL's. bf16 and fp16 are
computed in fp32: CPUs without half-precision units multiply them 200 times slower. Formulas: bottleneck.py.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.fallback import Unsupported

EPS = 1e-5
CHUNK = 1 << 20  # values of one step, 4 MB: with 1 MB two threads wait too often, 16 MB exceed the cache
aten = torch.ops.aten


class Run(NamedTuple):
    """Hold neighbouring images of one size, whose rows are adjacent."""

    image: int  # the first
    n: int  # images
    row: int  # the first
    h: int
    w: int

    @property
    def rows(self) -> slice:
        """Return the rows of the images."""
        return slice(self.row, self.row + self.n * self.h * self.w)

    @property
    def images(self) -> slice:
        """Return the images."""
        return slice(self.image, self.image + self.n)

    def flat(self, x: Tensor) -> Tensor:
        """Return the view [n, h·w, C] of the rows of x."""
        return x[self.rows].view(self.n, self.h * self.w, -1)

    def batch(self, x: Tensor) -> Tensor:
        """Return the view [n, C, h, w], channels last, of the rows of x."""
        return x[self.rows].view(self.n, self.h, self.w, -1).permute(0, 3, 1, 2)


def runs(table: Tensor, op: str) -> list[Run]:
    """Return the runs of images; raise Unsupported for an image of which some patches are missing."""
    result: list[Run] = []
    for i, (row, rows, h, w) in enumerate(table.tolist()):
        if rows == 0:
            continue
        if rows != h * w:
            raise Unsupported(f"{op}: patches of image {i} is {rows}, expected {h * w}")
        last = result[-1] if result else Run(-1, 0, -1, 0, 0)
        if (last.h, last.w, last.images.stop, last.rows.stop) == (h, w, i, row):
            result[-1] = last._replace(n=last.n + 1)
        else:
            result.append(Run(i, 1, row, h, w))
    return result


def pool(x: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Pool x [P, C] -> [N·oh·ow, C]."""
    y = x.new_zeros(len(table), oh, ow, x.shape[1])
    for run in runs(table, "adaptive_pool"):
        y[run.images] = F.adaptive_avg_pool2d(run.batch(x).to(wide(x.dtype)), (oh, ow)).permute(0, 2, 3, 1)
    return y.view(len(table) * oh * ow, x.shape[1])


def pool_backward(dy: Tensor, table: Tensor, owner: Tensor, oh: int, ow: int) -> Tensor:
    """Return the gradient [P, C] of the pooled tensor."""
    dx, dy = dy.new_zeros(len(owner), dy.shape[1]), dy.contiguous().view(len(table), oh, ow, dy.shape[1])
    for run in runs(table, "adaptive_pool"):
        into = run.batch(dx)
        exact = torch.empty_like(into, dtype=wide(dy.dtype))
        d = dy[run.images].permute(0, 3, 1, 2).to(exact.dtype)
        into.copy_(aten._adaptive_avg_pool2d_backward(d, exact))
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
    if x.numel() == 0 or x.device.type != "cpu":
        return torch.mm(x, w.t())
    y = F.conv2d(x.view(1, 1, len(x), -1).permute(0, 3, 1, 2), w.view(*w.shape, 1, 1))
    return y.permute(0, 2, 3, 1).reshape(len(x), len(w))


def _wide(*tensors: Tensor | None) -> list:
    """Convert half precision to fp32."""
    return [None if t is None else t.to(wide(t.dtype)) for t in tensors]


def _conv(a: Tensor, w: Tensor, images: Sequence[Run]) -> Tensor:
    """Convolve depthwise, 3×3, with w [C, 1, 3, 3]; return zeros in rows of no image."""
    u = _rows_like(a, images)
    for run in images:
        run.batch(u).copy_(F.conv2d(run.batch(a), w, padding=1, groups=len(w)))
    return u


def _rows_like(x: Tensor, images: Sequence[Run]) -> Tensor:
    """Allocate a tensor like x: empty, or zeros if there are rows of no image."""
    whole = sum(run.n * run.h * run.w for run in images) == len(x)
    return torch.empty_like(x) if whole else torch.zeros_like(x)


def _gate(b: Tensor, gate: Tensor, images: Sequence[Run]) -> None:
    """Multiply b in place by its image's gate."""
    for run in images:
        run.flat(b).mul_(gate[run.images, None])


def forward(
    x: Tensor, geometry: Sequence[Tensor], weights: Sequence[Tensor], size: Sequence[int], keep: bool
) -> list[Tensor]:
    """Return y and the tensors for backward; see bottleneck.forward."""
    (table, owner, _), (oh, ow), dtype = geometry, size, x.dtype
    images = runs(table, "conv_block")
    x, w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, *down = _wide(x, *weights)
    wd, gd, bd = down or (None, None, None)
    u1 = _product(x, w1)
    a = _norm_silu(u1, g1, b1, torch.empty_like(u1) if keep else u1)
    u2 = _conv(a, w2.view(-1, 1, 3, 3), images)
    b = _norm_silu(u2, g2, b2, u2)
    mean = b.new_zeros(len(table), b.shape[1])
    for run in images:
        n, area = run.n, run.h * run.w
        torch.bmm(b.new_full((n, 1, area), 1 / area), run.flat(b), out=mean[run.images, None])
    hidden = torch.addmm(c1, mean, f1.t())
    gate = torch.sigmoid_(torch.addmm(c2, F.silu(hidden), f2.t()))
    _gate(b, gate, images)
    u3 = _product(b, w3)
    v = x.new_empty(0) if wd is None else _product(x, wd)
    y = _rows_like(u3, images)
    for run in images:
        for u, s, into in _chunks(*(t[run.rows] for t in (u3, x if wd is None else v, y))):
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
    for run in images:
        for d, u, s, du, dx in _chunks(*(t[run.rows] for t in (dy, u3, x if wd is None else v, du3, ds))):
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
    kernel = w2.view(C, 1, 3, 3)
    u2 = _conv(a, kernel, images)
    b = _norm_silu(u2, g2, b2, torch.empty_like(u2))
    dgate = torch.zeros_like(gate)
    for run in images:
        for i, own, d in zip(range(run.image, run.images.stop), run.flat(b), run.flat(dc)):
            for p, q in _chunks(own, d):
                dgate[i] += (p * q).sum(0)
    dz = aten.sigmoid_backward(dgate, gate)
    dhidden = aten.silu_backward(torch.mm(dz, f2), hidden)
    dmean = torch.mm(dhidden, f1)
    for run in images:
        run.flat(dc).mul_(gate[run.images, None]).add_(dmean[run.images, None], alpha=1 / (run.h * run.w))
    du2, sums2 = _norm_silu_backward(dc, u2, g2, b2)
    da, dw2 = _conv(du2, kernel.flip(2, 3), images), torch.zeros_like(kernel)
    for run in images if need_weights else ():
        dw2 += torch.nn.grad.conv2d_weight(run.batch(a), kernel.shape, run.batch(du2), padding=1, groups=C)
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
