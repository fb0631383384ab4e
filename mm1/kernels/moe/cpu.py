"""Compute the mixture-of-experts MLP on a CPU: one product for each expert, and no Python code for each token.

Experts go in runs: neighbours with at most RUN_ROWS rows together, or one larger expert. The intermediate results of a
run stay in cache, and small experts share all calls but the products. Products of bf16 and fp16 are computed in fp32
where the CPU has no units for them; all else is computed in fp32, or in fp64 for fp64. Formulas: experts.py.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.moe.activation import ACTIVATIONS, Activation

# Up to so many rows MKL computes (w xᵀ)ᵀ faster than x wᵀ, for which it packs w: 2 × at 2 to 8 rows, 1.2 × at 64.
FEW_ROWS = 64
RUN_ROWS = 256


def forward(
    x: Tensor, order: Sequence[Tensor], weight: Tensor, gate_up: Tensor, up: Tensor | None, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y [T, D] and, with `keep`, h [T·K, 2F], gates before ups, else h without columns."""
    slots, position, offsets = order
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
    dy: Tensor, x: Tensor, h: Tensor, order: Sequence[Tensor], weight: Tensor, gate_up: Tensor, up: Tensor | None,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None,
    shift: float, interleaved: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x, weight and, with `weights`, of gate_up, up, down and the biases, else empty ones."""
    slots, position, offsets = order
    gate = Gate(ACTIVATIONS[activation], down.shape[2], limit, shift)
    ups = projections(gate_up, up, gate_up_bias, gate.width, interleaved)
    parameters = gate_up, up, down, gate_up_bias, down_bias
    grads = [torch.empty_like(p) if p is not None and weights else x.new_empty(0) for p in parameters]
    dgate_up, dup, ddown, dbias, ddown_bias = (g if p is not None else None for g, p in zip(grads, parameters))
    dups = projections(dgate_up, dup, dbias, gate.width, interleaved) if weights else []
    tokens, ends, units = slots // max(position.shape[1], 1), offsets.tolist(), _units(x)
    dots = weight.new_empty(len(slots))
    dx = x.new_empty(len(slots), x.shape[1], dtype=wide(x.dtype))
    row_weight = weight.flatten().index_select(0, slots)[:, None]
    for rows, experts in _runs(ends):
        x_r, dy_r = x.index_select(0, tokens[rows]), dy.index_select(0, tokens[rows]).to(dx.dtype)
        h_r = h[rows] if h.shape[1] else _hidden(x_r, experts, ups, units, h[rows])
        h_r = h_r.to(x.dtype).to(dx.dtype)  # a recomputed h is rounded as a kept one
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
        # dh lacks the factor weight, which multiplies x and dy here and dx below: they have fewer columns.
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
    """Applies the activation to rows of h [n, 2F] in fp32 or fp64, or [n, F] without a gate."""

    act: Activation
    width: int
    limit: float | None
    shift: float

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the activation's argument, and the factor of its result."""
        gate, up = h[:, : self.width], h[:, self.width :] if h.shape[1] > self.width else None
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), None if up is None else up.clamp(-self.limit, self.limit)
        return gate, up + self.shift if up is not None and self.shift else up

    def value(self, h: Tensor) -> Tensor:
        gate, up = self.halves(h)
        s = self.act.value(gate)
        return s if up is None else s.mul_(up)

    def backward(self, ds: Tensor, h: Tensor, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Return dh and s, and store ⟨ds, s⟩ in dots; ds is overwritten."""
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
    """Return weight [E, N, D] and bias [E, N] of each product; their results are h's columns, side by side."""
    if up is not None:
        return [(whole, None), (up, None)]
    if interleaved and whole.shape[1] > width:
        return [(whole[:, i::2], None if bias is None else bias[:, i::2]) for i in (0, 1)]
    return [(whole, bias)]


def _columns(ups: list[tuple[Tensor, Tensor | None]]) -> int:
    return sum(w.shape[1] for w, _ in ups)


def _runs(ends: list[int]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Yield the rows of each run, and its experts with their rows inside the run; experts without rows are left out."""
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
    """Return the dtype in which products are computed."""
    if x.dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return wide(x.dtype)


def _hidden(
    x: Tensor, experts: list[tuple[int, slice]], ups: list[tuple[Tensor, Tensor | None]], units: torch.dtype,
    kept: Tensor,
) -> Tensor:  # fmt: skip
    """Return h fp32 [n, 2F] of a run: `kept` itself where that has columns of fp32, else with a copy in `kept`."""
    direct = kept.shape[1] > 0 and kept.dtype == wide(x.dtype)
    h = kept if direct else x.new_empty(len(x), _columns(ups), dtype=wide(x.dtype))
    for half, (w, bias) in zip(h.split(ups[0][0].shape[1], 1), ups):
        for e, part in experts:
            _linear(x[part], w[e], None if bias is None else bias[e], units, half[part])
    if kept.shape[1] and not direct:
        kept.copy_(h)
    return h


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, units: torch.dtype, out: Tensor) -> None:
    """Store x wᵀ + bias in out, fp32."""
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
    """Return Σ_k weight[t, k] · y[position[t, k]], over rows before `used`."""
    if not position.numel():
        return y.new_zeros(len(position), y.shape[1])
    if used < len(y):
        y[used:].zero_()
        weight = torch.where(position < used, weight, 0.0)
    return F.embedding_bag(position, y, per_sample_weights=weight, mode="sum")
