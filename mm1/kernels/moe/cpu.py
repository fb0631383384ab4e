"""The mixture-of-experts MLP on CPU: plain products expert by expert, no work a token in Python.

What lies between gather and combine is scratch for one run of experts: neighbours of at most RUN_ROWS rows together, or
one larger expert. So it stays in cache, and small experts share the calls of all but the products. Products of bf16
and fp16 are computed in fp32 where the CPU has no units for them; all else is fp32, or fp64 for fp64. Formulas:
experts.py.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.moe.activation import ACTIVATIONS, Activation

# Up to so many rows MKL is faster at (w xᵀ)ᵀ than at x wᵀ, for which it packs w: twice at 2 to 8 rows, 1.2 × at 64.
FEW_ROWS = 64
RUN_ROWS = 256


def forward(
    x: Tensor, slots: Tensor, position: Tensor, offsets: Tensor, weight: Tensor, gate_up: Tensor, up: Tensor | None,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None,
    shift: float, interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, D], and h [T·K, 2F], gates before ups, with `keep` (else without columns)."""
    gate = Gate(ACTIVATIONS[activation], down.shape[2], limit, shift)
    ups = projections(gate_up, up, gate_up_bias, gate.width, interleaved)
    tokens, ends, units = slots // max(position.shape[1], 1), offsets.tolist(), _units(x)
    h = x.new_empty(len(slots), _columns(ups) if keep else 0)
    y = x.new_empty(len(slots), x.shape[1], dtype=wide(x.dtype))
    for rows, experts in _runs(ends):
        s = gate.value(_hidden(x.index_select(0, tokens[rows]), experts, ups, units, h[rows]))
        for e, part in experts:
            _linear(s[part], down[e], None if down_bias is None else down_bias[e], units, y[rows][part])
    return _combine(y, position, ends[-1], weight).to(x.dtype), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, slots: Tensor, position: Tensor, offsets: Tensor, weight: Tensor,
    gate_up: Tensor, up: Tensor | None, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, limit: float | None, shift: float, interleaved: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight and, with `weights`, gate_up, up, down and the biases (empty where there is none)."""
    gate = Gate(ACTIVATIONS[activation], down.shape[2], limit, shift)
    ups = projections(gate_up, up, gate_up_bias, gate.width, interleaved)
    given = (gate_up, up, down, gate_up_bias, down_bias)
    grads = [torch.empty_like(w) if w is not None and weights else x.new_empty(0) for w in given]
    dgate_up, dup, ddown, dbias, ddown_bias = (g if w is not None else None for g, w in zip(grads, given))
    dups = projections(dgate_up, dup, dbias, gate.width, interleaved) if weights else []
    tokens, ends, units = slots // max(position.shape[1], 1), offsets.tolist(), _units(x)
    dots = weight.new_empty(len(slots))
    dx = x.new_empty(len(slots), x.shape[1], dtype=wide(x.dtype))
    row_weight = weight.flatten().index_select(0, slots)[:, None]
    for rows, experts in _runs(ends):
        x_r, dy_r = x.index_select(0, tokens[rows]), dy.index_select(0, tokens[rows]).to(dx.dtype)
        h_r = h[rows] if h.shape[1] else _hidden(x_r, experts, ups, units, h[rows])
        h_r = h_r.to(x.dtype).to(dx.dtype)  # computed again, it is rounded as what is kept is
        ds = dy_r.new_empty(len(dy_r), gate.width)
        for e, part in experts:
            _product(dy_r[part], down[e], units, out=ds[part])
        dh, s = gate.backward(ds, h_r, dots[rows])
        dhs, dx_r, w = dh.split(ups[0][0].shape[1], 1), dx[rows], row_weight[rows]
        for e, part in experts:
            if down_bias is not None:
                dots[rows][part] += dy_r[part] @ down_bias[e].to(dx.dtype)
            _product(dhs[0][part], ups[0][0][e], units, out=dx_r[part])
            if len(dhs) == 2:
                dx_r[part] += _product(dhs[1][part], ups[1][0][e], units)
        if not weights:
            continue
        # dh is without the weight, which joins x and dy here and the sum of dx below: they have fewer columns.
        x_r, dy_r = x_r * w, dy_r.mul_(w)
        assert ddown is not None
        for e, part in experts:
            _product(dy_r[part].t(), s[part], units, out=ddown[e])
            if ddown_bias is not None:
                torch.sum(dy_r[part], 0, out=ddown_bias[e])
            for dh_i, (dw, db) in zip(dhs, dups):
                _product(dh_i[part].t(), x_r[part], units, out=dw[e])
                if db is not None:
                    db[e] = dh_i[part].t() @ w[part, 0]
    for grad in grads if weights else []:
        _zero_idle(grad, ends)
    dweight = torch.where(position < ends[-1], dots[position], 0.0)
    return [_combine(dx, position, ends[-1], weight).to(x.dtype), dweight, *grads]


class Gate(NamedTuple):
    """The activation on rows of h [n, 2F] in fp32 or fp64, or [n, F] without a gate."""

    act: Activation
    width: int
    limit: float | None
    shift: float

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is activated, and what that is multiplied with."""
        gate, up = h[:, : self.width], h[:, self.width :] if h.shape[1] > self.width else None
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), None if up is None else up.clamp(-self.limit, self.limit)
        return gate, up + self.shift if up is not None and self.shift else up

    def value(self, h: Tensor) -> Tensor:
        gate, up = self.halves(h)
        s = self.act.value(gate)
        return s if up is None else s.mul_(up)

    def backward(self, ds: Tensor, h: Tensor, dots: Tensor) -> tuple[Tensor, Tensor]:
        """dh and s; fills dots with ⟨ds, s⟩, and ds with anything."""
        gate, up = self.halves(h)
        dh, s = torch.empty_like(h), self.act.value(gate)
        if up is not None:
            torch.mul(ds, s, out=dh[:, self.width :])
            s.mul_(up)
        torch.linalg.vecdot(ds, s, out=dots)
        self.act.backward(ds if up is None else ds.mul_(up), gate, dh[:, : self.width])
        if self.limit is not None:
            dh[:, : self.width].mul_(h[:, : self.width] <= self.limit)
            dh[:, self.width :].mul_(h[:, self.width :].abs() <= self.limit)
        return dh, s


def projections(whole, up, bias, width: int, interleaved: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [E, N, D] and bias [E, N] of each product that makes a stretch of h's columns."""
    if up is not None:
        return [(whole, None), (up, None)]
    if interleaved and whole.shape[1] > width:
        return [(whole[:, i::2], None if bias is None else bias[:, i::2]) for i in (0, 1)]
    return [(whole, bias)]


def _columns(ups: list[tuple[Tensor, Tensor | None]]) -> int:
    return sum(w.shape[1] for w, _ in ups)


def _runs(ends: list[int]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Rows of each run, and its experts that have any with theirs inside the run."""
    first = begin = 0
    experts: list[tuple[int, slice]] = []
    for expert, end in enumerate(ends):
        if experts and end - first > RUN_ROWS:
            yield slice(first, begin), experts
            first, experts = begin, []
        if end > begin:
            experts.append((expert, slice(begin - first, end - first)))
        begin = end
    if experts:
        yield slice(first, begin), experts


def _zero_idle(grad: Tensor, ends: list[int]) -> None:
    if grad.numel():
        for expert, (begin, end) in enumerate(pairwise([0, *ends])):
            if begin == end:
                grad[expert].zero_()


def _units(x: Tensor) -> torch.dtype:
    """In what products are computed."""
    if x.dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return wide(x.dtype)


def _hidden(
    x: Tensor, experts: list[tuple[int, slice]], ups: list[tuple[Tensor, Tensor | None]], units: torch.dtype,
    kept: Tensor,
) -> Tensor:  # fmt: skip
    """fp32 [n, 2F] of a run: in `kept` itself where that has columns of fp32, else with a copy there."""
    direct = kept.shape[1] > 0 and kept.dtype == wide(x.dtype)
    h = kept if direct else x.new_empty(len(x), _columns(ups), dtype=wide(x.dtype))
    for half, (w, bias) in zip(h.split(ups[0][0].shape[1], 1), ups):
        for e, part in experts:
            _linear(x[part], w[e], None if bias is None else bias[e], units, half[part])
    if kept.shape[1] and not direct:
        kept.copy_(h)
    return h


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, units: torch.dtype, out: Tensor) -> None:
    """out fp32 = x wᵀ + bias"""
    if len(x) <= FEW_ROWS:
        out.copy_(_product(w, x.t(), units).t())
    else:
        _product(x, w.t(), units, out=out)
    if bias is not None:
        out.add_(bias)


def _product(a: Tensor, b: Tensor, units: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    a, b = a.to(units), b.to(units)
    if out is None:
        return torch.mm(a, b).to(wide(units))
    return torch.mm(a, b, out=out) if out.dtype == units else out.copy_(a @ b)


def _combine(y: Tensor, position: Tensor, used: int, weight: Tensor) -> Tensor:
    """Σ_k weight[t, k] · y[position[t, k]], where that row is one of the first `used`."""
    if not position.numel():
        return y.new_zeros(len(position), y.shape[1])
    if used < len(y):
        y[used:].zero_()
        weight = torch.where(position < used, weight, 0.0)
    return F.embedding_bag(position, y, per_sample_weights=weight, mode="sum")
