"""Attention's back-ends beside each other: same process, rounds interleaved, medians, each checked before it is timed.

Rates are shares of what a large bf16 product reaches in the same run; backward counts 2.5 times forward's operations.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.autotune.gpu_state import watched
from mm1.bench.experts import _machine, _medians
from mm1.engine.data.record import DataError
from mm1.kernels.attention import BACKENDS, attention, cost, gpu_name


class Case(NamedTuple):
    segments: int
    length: int
    heads: int
    kv_heads: int
    head_width: int
    causal: bool


CASES = {
    "vit-h": Case(64, 729, 16, 16, 80, False), "vit-l": Case(64, 576, 16, 16, 64, False),
    "sub-images": Case(5 * 4, 2304, 16, 16, 80, False), "decoder": Case(4, 2048, 32, 8, 128, True),
}  # fmt: skip
CPU_CASES = {"vit-h": Case(4, 196, 4, 4, 80, False), "decoder": Case(4, 128, 8, 2, 64, True)}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # rms of y and of the gradients; bf16 rounds to 1.65e-3
PRODUCT = 8192  # side of the product whose rate is the peak


def measure(rounds: int, case: str | None = None) -> dict[str, Any]:
    """Seconds of forward, and of forward + backward, for every case; prints a line each, returns the record."""
    gpu = torch.cuda.is_available()
    cases = CASES if gpu else CPU_CASES
    if rounds < 1 or (case is not None and case not in cases):
        known = ", ".join(cases)
        raise DataError(f"bench attention: rounds {rounds}, case {case}; expected 1 or more, and one of {known}")
    rows = []
    for name in [case] if case else cases:
        row = watched(functools.partial(_row, cases[name], rounds, "cuda" if gpu else "cpu"))
        rows.append({"case": name, **row})
        _print(rows[-1])
    return {"bench": "attention", **_machine(), "rows": rows}


def _row(case: Case, rounds: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = case.segments * case.length
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    if case.heads == case.kv_heads:
        q, k, v = new(rows, 3, case.heads, case.head_width).unbind(1)  # as one projection gives them
    else:
        q, k, v = (new(rows, heads, case.head_width) for heads in (case.heads, case.kv_heads, case.kv_heads))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    dy = new(q.shape)
    cu = torch.arange(case.segments + 1, device=device, dtype=torch.int32) * case.length
    runs, errors, refused = {}, {}, {}
    truth = _truth(case, given, dy)
    for backend in _backends(device):
        run = functools.partial(attention, cu_seqlens=cu, causal=case.causal, max_length=case.length, backend=backend)
        try:
            y = run(*given)
            found = [y.detach(), *torch.autograd.grad(y, given, dy)]
        except Exception as error:  # a back-end that cannot is a result too
            refused[backend] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        errors[backend] = max(_error(f, t) for f, t in zip(found, truth))
        if errors[backend] > TOLERANCE[dtype]:
            refused[backend] = f"wrong by {errors[backend]:.2g}"
        else:
            runs[backend] = run
    seconds = {
        "forward": _medians({name: _forward(run, given) for name, run in runs.items()}, rounds, device),
        "forward+backward": _medians({name: _both(run, given, dy) for name, run in runs.items()}, rounds, device),
    }
    lengths = [case.length] * case.segments
    flops = cost(lengths, case.heads, case.kv_heads, case.head_width, causal=case.causal).flops
    row = {**case._asdict(), "dtype": str(dtype).removeprefix("torch."), "flops": flops, "peak": _peak(rounds, device)}
    return row | {
        "seconds": seconds,
        "errors": errors,
        "refused": refused,
        "shares": _shares(flops, row["peak"], seconds),
    }


def _backends(device: str) -> list[str]:
    """The reference holds all pairs of rows: only small cases."""
    if device == "cpu":
        return ["segments", "reference"]
    missing = [name for name in ("flash_attn", "xformers") if importlib.util.find_spec(name) is None]
    hidden = {"reference", "segments", *(name.removesuffix("_attn") for name in missing)}
    return [name for name in BACKENDS if name not in hidden]


def _truth(case: Case, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and gradients in fp32, segment by segment, by torch's plain mathematics."""
    parts = []
    for start in range(0, case.segments * case.length, case.length):
        rows = slice(start, start + case.length)
        q, k, v = (x[rows].detach().float().requires_grad_() for x in given)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))
            y = F.scaled_dot_product_attention(a, b, c, is_causal=case.causal, enable_gqa=True)[0].transpose(0, 1)
        parts.append([y.detach(), *torch.autograd.grad(y, [q, k, v], dy[rows].float())])
    return [torch.cat(part) for part in zip(*parts)]


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


def _forward(run: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return run(*given)

    return call


def _both(run: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(run(*given), given, dy)


def _peak(rounds: int, device: str) -> float:
    """Operations a second of one large product."""
    side = PRODUCT if device == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return 2 * side**3 / _medians({"product": lambda: a @ a}, rounds, device)["product"]


def _shares(flops: int, peak: float, seconds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name, forward in seconds["forward"].items():
        if name in seconds["forward+backward"]:
            backward = seconds["forward+backward"][name] - forward
            found[name] = {"forward": flops / forward / peak, "backward": 2.5 * flops / backward / peak}
    return found


def table(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What "auto" looks up: the first case of each head width, causality and dtype counts."""
    found, seen = [], set()
    for row in record["rows"]:
        key = {name: row[name] for name in ("head_width", "causal", "dtype")}
        if tuple(key.values()) not in seen:
            seen.add(tuple(key.values()))
            found += [{**key, "backend": name, **shares} for name, shares in row["shares"].items()]
    return found


def _print(row: dict[str, Any]) -> None:
    case = Case(*(row[name] for name in Case._fields))
    print(f"{row['case']} {case.segments} × {case.length}, heads {case.heads}/{case.kv_heads} × {case.head_width}"
          f"{', causal' if case.causal else ''}   product {row['peak'] / 1e12:.3g} TFLOP/s")  # fmt: skip
    for name, share in row["shares"].items():
        rates = "   ".join(f"{what} {s * row['peak'] / 1e12:.3g} TFLOP/s {s:.0%}" for what, s in share.items())
        print(f"  {name:10} {rates}   error {row['errors'][name]:.1g}")
    for name, why in row["refused"].items():
        print(f"  {name:10} {why}")


if __name__ == "__main__":  # needs torch and triton alone, for machines without the rest
    record = measure(rounds=20)
    if torch.cuda.is_available():
        results = Path(__file__).parent / "results" / re.sub(r"\W+", "-", record["device"].lower())
        tables = Path(__file__).parents[1] / "autotune" / "tables" / "attention"
        for path, content in ((results / "attention.json", record), (tables / f"{gpu_name(None)}.json", table(record))):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
