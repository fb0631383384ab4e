"""Make the checks of the first contact with a GPU: the cases of each, how one runs, and which ops are to blame.

A case compares an op, forward and backward, with its reference at one size, or a whole step with plain torch's. See
contact.py, which runs each check in a process of its own.
"""

import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.autotune.space import Inputs
from mm1.bench.kernels import TOLERANCE, WIDE, rms, rms_error
from mm1.bench.ops import OPS, Problem, calls
from mm1.bench.roofline import DTYPES
from mm1.kernels.attention import Causal, Full, Prefix, attention
from mm1.kernels.attention.backends import BACKENDS, installed
from mm1.kernels.attention.masks import Mask
from mm1.kernels.attention.reference import attention as attention_reference
from mm1.kernels.dispatch import Cost
from mm1.kernels.fallback import plain_ops, watching
from mm1.kernels.language import INTERPRETED
from mm1.kernels.moe.quantized import dequantized, linear_8, moe_mlp_8
from mm1.kernels.moe.reference import moe_mlp as moe_reference

# Beside each op's first case of a GPU: the smallest sizes, and ragged ones.
SMALL: dict[str, list[tuple[Any, ...]]] = {
    "moe_mlp": [("fine", 1), ("fine", 0), ("fine", 77)],
    "patch_embed": [("tiny", 3, 64, 2), ("tiny", 3, 128), ("tiny", 3, 128, 16)],
    "embed_patches": [("tiny", 3, 64, 2), ("tiny", 3, 128)],
    "patch_loss": [("tiny", 3, 64, 2), ("tiny", 3, 128), ("tiny", 1, 128, 16)],
    "qwen_embed": [("tiny", 3, 64, 2)],
    "conv_block": [("tiny", 3, 64), ("mixed", 2, 128)],
    "adaptive_pool": [("tiny", 3, 64), ("mixed", 2, 128)],
    "c_abstractor": [("tiny", 3, 64)],
    "grouped_gemm": [(1, 4, 64, 64), (100, 8, 72, 200)],
    "attention": [(1, 1, 2, 2, 64, True), (3, 37, 4, 2, 80, True), (2, 130, 4, 4, 80, False), (2, 70, 4, 1, 128, True)],
    "paged_attention": [(1, 1, 1, 2, 1, 64), (3, 1, 70, 4, 2, 128)],
    "route": [(1, 4, 1), (77, 8, 2), (33, 512, 8)],
    "linear_cross_entropy": [(1, 64, 10), (33, 72, 1000)],
}
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
MASKS: dict[str, Callable[[str], Mask]] = {
    "full": lambda device: Full(), "causal": lambda device: Causal(),
    "prefix": lambda device: Prefix(torch.tensor([0, 20, 5, 200], device=device, dtype=torch.int32)),
}  # fmt: skip
WHOLE = ("train", "decode")  # checks of steps that must run as they do for users, without waits between ops
DEAD = 3  # exit status of a process whose GPU fails every call
# Sizes for a GPU alone, where an op's first case fills a GPU that other checks share.
LARGE: dict[str, list[tuple[Any, ...]]] = {"moe_mlp": [("coarse", 130, "one"), ("olmoe", 8192)]}
FEW: list[tuple[Any, ...]] = [("fine", 1), ("fine", 7), ("coarse", 3)]  # of moe_mlp without gradients
ZERO = 1e-6  # of the largest rms: a smaller result is zero but for rounding

# A case returns errors by name, relative to the rms of the truth, and raises where one is too large.
Case = Callable[[], dict[str, float]]


class Wrong(Exception):
    """Raised by a case whose results are too far from the reference's."""


class Context(NamedTuple):
    """Say where cases run."""

    device: str  # "cuda", "cuda:1" or "cpu"
    dtypes: tuple[str, ...]

    @property
    def large(self) -> bool:
        """Return whether cases may have the sizes of a GPU."""
        return self.device == "cuda"


# ---- The checks: functions that make cases by name, in the order in which they run ----


def op_cases(op: str, on: Context) -> Iterator[tuple[str, Case]]:
    """Yield an op's cases: each size in each dtype, forward and, if the op has one, backward."""
    for args in SMALL[op]:
        for dtype in on.dtypes:
            yield f"{' '.join(map(str, args))} {dtype}", partial(compare, op, args, DTYPES[dtype], on.device)
    if on.large:
        for args in LARGE.get(op, [*OPS[op].cases["cuda"].values()][:1]):
            yield f"{' '.join(map(str, args))} bf16", partial(compare, op, args, torch.bfloat16, on.device)
        yield "plain torch", partial(in_plain_torch, partial(compare, op, SMALL[op][0], torch.bfloat16, on.device))


def in_plain_torch(run: Case) -> dict[str, float]:
    """Run a case without kernels, as users do where those do not work."""
    with plain_ops():
        return run()


def compare(
    op: str, args: tuple[Any, ...], dtype: torch.dtype, device: str, gradients: bool = True
) -> dict[str, float]:
    """Check an op at one size; see `check`."""
    torch.manual_seed(0)
    return check(OPS[op].problem(Inputs(device, dtype), *args), dtype, gradients and OPS[op].backward)


def check(problem: Problem, dtype: torch.dtype, backward: bool = True) -> dict[str, float]:
    """Return the errors of a problem's result and gradients. Raises Wrong for one beyond its tolerance."""
    wide = {name: leaf.detach().to(WIDE[dtype]) for name, leaf in problem.leaves.items()}
    truth, dy = _results(problem.plain, wide, backward)
    ours, _ = _results(problem.ours, problem.leaves, backward, dy)
    # A gradient that is zero, as that of a softmax over one key, has no scale of its own: the largest one's counts.
    sizes = {name: rms(truth[name]) for name in ours}
    largest = max(sizes.values())
    scales = {name: size if size >= ZERO * largest else largest for name, size in sizes.items()}
    errors = {name: rms_error(ours[name], truth[name], scales[name]) for name in ours}
    limit = TOLERANCE[dtype] * problem.tolerance
    if wrong := [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= limit]:
        raise Wrong(f"relative to rms and with a tolerance of {limit:.2g}: {', '.join(wrong)}")
    return errors


def _results(
    run: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor], backward: bool, dy: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the result "y" and the gradients by name, and the gradient of y that was used (dy, or a random one)."""
    leaves = {name: leaf.detach().requires_grad_(backward) for name, leaf in leaves.items()}
    y = run(leaves)
    if not backward:
        return {"y": y}, None
    dy = torch.randn_like(y) if dy is None else dy
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    found = {name: gradient for name, gradient in zip(leaves, gradients) if gradient is not None}
    return {"y": y.detach(), **found}, dy


def few_token_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield cases of moe_mlp with the few tokens of a decoding step, which has kernels of its own."""
    for args in [*FEW, *([("qwen3-30b", 16)] if on.large else [])]:
        for dtype in on.dtypes:
            yield (
                f"{' '.join(map(str, args))} {dtype}",
                partial(compare, "moe_mlp", args, DTYPES[dtype], on.device, gradients=False),
            )


def quantized_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield cases of the ops with weights of 8 bits. A CPU without the interpreter rounds more than they allow."""
    if on.large or INTERPRETED:
        for op, rows, weights in product(("linear_8", "moe_mlp_8"), (1, 5, 70), EIGHT_BITS):
            for dtype in on.dtypes:
                if INTERPRETED and dtype == "bf16":
                    continue  # the interpreter converts int8 to bf16 wrongly
                yield (
                    f"{op} {rows} {str(weights).removeprefix('torch.')} {dtype}",
                    partial(quantized, op, rows, weights, DTYPES[dtype], on.device),
                )


def quantized(op: str, rows: int, weights: torch.dtype, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Check an op with weights of 8 bits of that dtype."""
    torch.manual_seed(0)
    E, D, F, K = 4, 64, 96, 2
    new = Inputs(device, dtype)
    matrices = [
        (50 * torch.randn(shape, device=device)).clamp(-127, 127).to(weights) for shape in ((E, 2 * F, D), (E, D, F))
    ]
    scales = [torch.rand(w.shape[:2], device=device) / 500 for w in matrices]
    index = torch.rand(rows, E, device=device).argsort(1)[:, :K].int()
    (gate_up, down), weight = matrices, torch.rand(rows, K, device=device)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        x = leaves["x"]
        wide = [dequantized(w, scale, x.dtype) for w, scale in zip(matrices, scales)]
        return torch.mm(x, wide[0][0].t()) if op == "linear_8" else moe_reference(x, index, weight.to(x.dtype), *wide)

    def ours(leaves: dict[str, Tensor]) -> Tensor:
        if op == "linear_8":
            return linear_8(leaves["x"], gate_up[0], scales[0][0])
        return moe_mlp_8(leaves["x"], index, weight, gate_up, scales[0], down, scales[1])

    return check(Problem({}, {"x": new.floats(rows, D)}, ours, plain, (Cost(0, 0), Cost(0, 0))), dtype, False)


def attention_cases(backend: str, on: Context) -> Iterator[tuple[str, Case]]:
    """Yield cases of one backend of attention, which "auto" may not choose: every mask, segments of 0 to 130 rows."""
    properties = BACKENDS[backend]
    here = (
        properties.auto or properties.gpu
        if on.large
        else backend == "segments" or (backend == "triton" and INTERPRETED)
    )
    if not (here and installed(backend)):
        return
    for mask in MASKS if properties.prefix != "refused" else ("full", "causal"):
        for dtype in on.dtypes if backend in ("triton", "segments") else ("bf16", "fp16"):
            yield f"{mask} {dtype}", partial(masked_attention, backend, mask, DTYPES[dtype], on.device)


def masked_attention(backend: str, mask: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Check a backend on ragged segments against the reference, which compares every pair of rows."""
    torch.manual_seed(0)
    new, lengths = Inputs(device, dtype), [1, 37, 0, 130]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32)
    inputs = {"cu_seqlens": cu_seqlens, "mask": MASKS[mask](device)}
    q, k, v = (new.floats(sum(lengths), heads, 64) for heads in (4, 2, 2))
    ours = partial(attention, **inputs, max_length=max(lengths), backend=backend)
    problem = Problem(
        {}, {"q": q, "k": k, "v": v}, calls(ours), calls(attention_reference, **inputs), (Cost(0, 0), Cost(0, 0))
    )
    return check(problem, dtype)


def second_gpu_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield one case of each op on the second GPU, while the first one is the current device."""
    if torch.cuda.device_count() > 1:
        for op, (args, *_) in SMALL.items():
            yield op, partial(compare, op, args, torch.bfloat16, "cuda:1")


def train_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield training steps of the smallest model: plain torch's, this project's, compiled, and without waits."""
    from mm1.bench.rungs import FULL, ladder
    from mm1.bench.train import SIZES, Steps

    dtype = "bf16" if on.large else "fp32"
    size, tokens = SIZES["digits"]
    steps = Steps(size, tokens, on.device, dtype, 1.0)
    plain = ladder(size, dtype)[0]
    first = []

    def attempt(rung: Any) -> dict[str, float]:
        if not first:  # also where the process that took the plain step died
            first.append(steps.attempt(plain))
        way = steps.attempt(rung)
        if wrong := steps.differs(way, first[0]):
            raise Wrong(wrong)
        return way.results

    for rung in (plain, FULL._replace(name="mm1, eager", compiled=False), FULL):
        yield rung.name, partial(attempt, rung)
    if on.large:
        yield "no synchronization", partial(unsynchronized, partial(steps.step, FULL, steps.sets[True][0]))


def unsynchronized(step: Callable[[], None]) -> dict[str, float]:
    """Run a step once, and once more with each wait of the host for the device being an error."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def decode_cases(on: Context) -> Iterator[tuple[str, Case]]:
    """Yield a decoded token, as the engine computes it, beside the last row of a prefill that is one token longer."""
    from mm1.bench.generate import TOLERANCE, Bench, prompts
    from mm1.engine.models.mm1_config import DIGITS

    dtype = "bf16" if on.large else "fp32"
    bench = Bench(DIGITS, on.device, dtype, {})

    @torch.inference_mode()
    def decode(batch: int) -> dict[str, float]:
        documents = prompts(DIGITS, 1, batch, images=False)
        step = bench.steps(documents)["mm1"]()
        tokens = bench.prefill(documents)[0]().argmax(-1)
        longer = [
            replace(d, tokens=np.append(d.tokens, np.int32(token))) for d, token in zip(documents, tokens.tolist())
        ]
        truth = bench.prefill(longer)[0]()
        errors = {name: rms_error(step().float(), truth.float()) for name in ("first", "again")}  # captured, replayed
        if max(errors.values()) > TOLERANCE[dtype]:
            raise Wrong(f"logits differ from a prefill's: {errors}")
        return errors

    for batch in (1, 3, 8):
        yield f"batch {batch} {dtype}", partial(decode, batch)


CHECKS: dict[str, Callable[[Context], Iterator[tuple[str, Case]]]] = {
    **{op: partial(op_cases, op) for op in SMALL},
    "few tokens": few_token_cases, "8 bits": quantized_cases,
    **{f"attention {name}": partial(attention_cases, name) for name in BACKENDS if name not in ("reference", "sdpa")},
    "train": train_cases, "decode": decode_cases, "second GPU": second_gpu_cases,
}  # fmt: skip


# ---- One process: the cases of a check, one line of JSON as each begins and one as it ends ----


Op = tuple[str, str]  # name and dtypes, as fallback.py has them


def run_check(cases: Iterable[tuple[str, Case]], skip: int, out: Path, wait: bool = True) -> None:
    """Run the cases but for the first `skip`, and append what happens to the file `out`.

    wait: wait for the GPU before each op, so that an error or a hang is that of the op that began last. Exits with
    status DEAD after a case that leaves the GPU unusable.
    """
    faulthandler.enable()
    with out.open("a") as lines:
        say = lambda **line: print(json.dumps(line), file=lines, flush=True)  # noqa: E731
        for case, run in islice(cases, skip, None):
            say(case=case)
            begin, ops = time.monotonic(), list[Op]()

            def begins(name: str, dtypes: str, ops: list[Op] = ops) -> None:
                if wait and torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()
                ops.append((name, dtypes))
                if wait:
                    say(begins=ops[-1])

            with watching(begins):
                result = attempt(run)
                alive = attempt(lambda: {})["status"] == "right"
                if result["status"] != "right":
                    result["blamed"] = to_blame(run, ops, say) if alive else ops[-1:] if wait else []
            say(**result, seconds=time.monotonic() - begin)
            if not alive:
                sys.exit(DEAD)


def attempt(run: Case) -> dict[str, Any]:
    """Return the fields of a case's row."""
    try:
        errors = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"status": "right", "errors": errors}
    except Exception as error:
        status, text = "wrong" if isinstance(error, Wrong) else "failed", traceback.format_exc()
        return {"status": status, "why": f"{type(error).__name__}: {error}"[:500], "traceback": text[-6000:]}


def to_blame(run: Case, ops: Sequence[Op], say: Callable[..., None]) -> list[Op]:
    """Return the op without whose kernels the case is right, or all ops of the case, or none if it is wrong anyway.

    say: called before each attempt, because a case that says nothing for long counts as hung.
    """
    distinct = list(dict.fromkeys(reversed(ops)))
    for suspects in [*([op] for op in distinct), distinct]:
        say(suspects=suspects)
        with plain_ops(*(name for name, _ in suspects)):
            if suspects and attempt(run)["status"] == "right":
                return [op for op in distinct if op[0] in {name for name, _ in suspects}]
    return []
