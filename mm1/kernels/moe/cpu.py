"""Compute the mixture-of-experts MLP on a CPU, with one product for each expert and no Python code for each token.

Experts are processed in runs: neighbours with at most RUN_ROWS rows together, or one larger expert. The intermediate
results of a run stay in cache, and small experts share all calls except the products. Products of bf16 and fp16 are
computed in fp32 where the CPU has no units for them; all else is computed in fp32, or in fp64 for fp64. See experts.py
for the formulas.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.moe.activation import ACTIVATIONS
from mm1.kernels.moe.arguments import empty_gradients, projections
from mm1.kernels.moe.reference import activate

# With at most FEW_ROWS rows MKL computes (w xᵀ)ᵀ faster than x wᵀ, for which it packs w: 2 × at 2 to 8 rows, 1.2 × at
# 64.
FEW_ROWS = 64
RUN_ROWS = 256


def forward(x, order, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved, keep):
    """Compute moe_mlp_forward of experts.py."""
    (slots, position, offsets), width = order, down.shape[2]
    ups = projections(gate_up, up, gate_up_bias, width, interleaved)
    tokens, ends, units = slots // max(position.shape[1], 1), offsets.tolist(), _units(x)
    h = x.new_empty(len(slots), len(ups) * ups[0][0].shape[1] if keep else 0)
    y = x.new_empty(len(slots), x.shape[1], dtype=wide(x.dtype))
    for rows, experts in _runs(ends):
        h_r = _hidden(x.index_select(0, tokens[rows]), experts, ups, units, h[rows])
        s = activate(h_r, None, width, activation, limit, shift)
        for e, part in experts:
            _linear(s[part], down[e], None if down_bias is None else down_bias[e], units, y[rows][part])
    return _combine(y, position, ends[-1], weight).to(x.dtype), h


def backward(
    dy, x, h, order, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved,
    weight_gradients,
):  # fmt: skip
    """Compute moe_mlp_backward of experts.py."""
    (slots, position, offsets), width = order, down.shape[2]
    ups = projections(gate_up, up, gate_up_bias, width, interleaved)
    parameters = gate_up, up, down, gate_up_bias, down_bias
    gradients = empty_gradients(x, parameters, weight_gradients)
    dgate_up, dup, _, dbias, ddown_bias = (None if p is None else g for p, g in zip(parameters, gradients))
    dups = projections(dgate_up, dup, dbias, width, interleaved) if weight_gradients else []
    tokens, ends, units = slots // max(position.shape[1], 1), offsets.tolist(), _units(x)
    dots = weight.new_empty(len(slots))
    dx = x.new_empty(len(slots), x.shape[1], dtype=wide(x.dtype))
    row_weight = weight.flatten().index_select(0, slots)[:, None]
    for rows, experts in _runs(ends):
        x_r, dy_r = x.index_select(0, tokens[rows]), dy.index_select(0, tokens[rows]).to(dx.dtype)
        h_r = h[rows] if h.shape[1] else _hidden(x_r, experts, ups, units, h[rows])
        h_r = h_r.to(x.dtype).to(dx.dtype)  # a recomputed h is rounded as a saved one
        ds = dy_r.new_empty(len(dy_r), width)
        for e, part in experts:
            _product(dy_r[part], down[e], units, out=ds[part])
        dh, s = _activate_backward(ds, h_r, dots[rows], activation, limit, shift)
        dhs, dx_r, w = dh.split(ups[0][0].shape[1], 1), dx[rows], row_weight[rows]
        for e, part in experts:
            if down_bias is not None:
                dots[rows][part] += dy_r[part] @ down_bias[e].to(dx.dtype)
            _product(dhs[0][part], ups[0][0][e], units, out=dx_r[part])
            if len(dhs) == 2:
                dx_r[part] += _product(dhs[1][part], ups[1][0][e], units)
        if not weight_gradients:
            continue
        # dh lacks the factor weight: it multiplies x and dy here and dx below, which have fewer columns.
        x_r, dy_r = x_r * w, dy_r.mul_(w)
        for e, part in experts:
            _product(dy_r[part].t(), s[part], units, out=gradients[2][e])
            if ddown_bias is not None:
                torch.sum(dy_r[part], 0, out=ddown_bias[e])
            for dh_i, (dw, db) in zip(dhs, dups):
                _product(dh_i[part].t(), x_r[part], units, out=dw[e])
                if db is not None:
                    db[e] = dh_i[part].t() @ w[part, 0]
    idle = [expert for expert, (begin, end) in enumerate(pairwise([0, *ends])) if begin == end]
    for gradient in gradients:
        if gradient.numel():
            gradient[idle] = 0
    dweight = torch.where(position < ends[-1], dots[position], 0.0)
    return [_combine(dx, position, ends[-1], weight).to(x.dtype), dweight, *gradients]


def _activate_backward(
    ds: Tensor, h: Tensor, dots: Tensor, activation: str, limit: float | None, shift: float
) -> tuple[Tensor, Tensor]:
    """Return dh and s for h [n, 2F], or [n, F] without a gate, and store ⟨ds, s⟩ in dots; ds [n, F] is overwritten."""
    act, width, dh = ACTIVATIONS[activation], ds.shape[1], torch.empty_like(h)
    gate, up = h[:, :width], h[:, width:]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = act.value(gate)
    if up.shape[1]:
        up = up + shift if shift else up
        torch.mul(ds, s, out=dh[:, width:])
        s.mul_(up)
    torch.linalg.vecdot(ds, s, out=dots)
    act.backward(ds.mul_(up) if up.shape[1] else ds, gate, dh[:, :width])
    if limit is not None:
        dh[:, :width].mul_(h[:, :width] <= limit)
        dh[:, width:].mul_(h[:, width:].abs() <= limit)
    return dh, s


def _runs(ends: list[int]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Yield the rows of each run, and the experts with rows in it, each with its rows inside the run."""
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


def _units(x: Tensor) -> torch.dtype:
    """Return the dtype in which products are computed."""
    if x.device.type != "cpu":
        return x.dtype
    if x.dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return wide(x.dtype)


def _hidden(
    x: Tensor, experts: list[tuple[int, slice]], ups: list[tuple[Tensor, Tensor | None]], units: torch.dtype,
    saved: Tensor,
) -> Tensor:  # fmt: skip
    """Return h fp32 [n, 2F] of a run, and store it in `saved` unless that has no columns."""
    direct = saved.shape[1] > 0 and saved.dtype == wide(x.dtype)
    h = saved if direct else x.new_empty(len(x), len(ups) * ups[0][0].shape[1], dtype=wide(x.dtype))
    for half, (w, bias) in zip(h.split(ups[0][0].shape[1], 1), ups):
        for e, part in experts:
            _linear(x[part], w[e], None if bias is None else bias[e], units, half[part])
    if saved.shape[1] and not direct:
        saved.copy_(h)
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
