"""Record what the first contact with a GPU launches, as "launches.py GPU OP FILE", for a test that compiles it.

The ops' bodies run on a CPU, in Triton's interpreter mode, and their launches are recorded instead of run. Results are
therefore undefined; integers among them are zeros, because host code uses them as indices.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm1.autotune.space import Inputs
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import Launch, recording
from mm1.kernels.language import TensorDescriptor

GPUS = {
    **DEVICES,
    "b300": replace(DEVICES["b200"], name="b300", arch="sm_103"),
    "mi350x": replace(DEVICES["mi300x"], name="mi350x", arch="gfx950", shared=160 << 10),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sizes of models, for their configurations, where torch's own products are small enough for a CPU.
LARGE: dict[str, list[tuple[Any, ...]]] = {
    "moe_mlp": [("olmoe", 8192)],
    "patch_embed": [("native", 4, 1280), ("native", 4, 1152, 16)],
    "embed_patches": [("native", 4, 1152, 16)],
    "patch_loss": [("square", 4, 2048), ("native", 4, 1024)],
    "qwen_embed": [("native", 4, 1280)],
    "conv_block": [("square", 2, 1024)],
    "adaptive_pool": [("square", 64, 1024)],
    "grouped_gemm": [(16384, 64, 3072, 8064)],
    "attention": [(4, 729, 16, 16, 80, False), (4, 2048, 32, 8, 128, True)],
    "paged_attention": [(8, 2048, 8192, 32, 8, 128)],
    "route": [(8192, 64, 2)],
    "linear_cross_entropy": [(16, 2048, 100352)],
}


class Unfilled(Inputs):
    """Make inputs without values, whose memory is never touched."""

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized tensor."""
        return torch.empty(*shape, dtype=dtype or self.dtype)


def cases(op: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield an op's cases of the first contact in each dtype, then large ones; "masks" are attention's masks."""
    from mm1.bench.checks import MASKS, SMALL
    from mm1.bench.ops import OPS
    from mm1.kernels.attention import attention

    def forward_and_backward(args: tuple[Any, ...], dtype: torch.dtype) -> None:
        problem = OPS[op].problem(Unfilled("cpu", dtype), *args)
        leaves = {name: leaf.detach().requires_grad_(OPS[op].backward) for name, leaf in problem.leaves.items()}
        y = problem.ours(leaves, **({"backend": "triton"} if op == "attention" else {}))
        if OPS[op].backward:
            torch.autograd.grad(y, [*leaves.values()], torch.empty_like(y), allow_unused=True)

    def masked(mask: str, dtype: torch.dtype) -> None:
        lengths = [1, 37, 0, 130]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        q, k, v = (torch.empty(sum(lengths), heads, 64, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
        y = attention(q, k, v, cu_seqlens, mask=MASKS[mask]("cpu"), max_length=130, backend="triton")
        torch.autograd.grad(y, [q, k, v], torch.empty_like(y))

    run, sizes = (masked, [*MASKS]) if op == "masks" else (forward_and_backward, SMALL[op])
    for args in sizes:
        for name, dtype in DTYPES.items():
            yield f"{args} {name}", lambda args=args, dtype=dtype: run(args, dtype)
    for args in LARGE.get(op, ()):
        yield f"{args} bf16", lambda args=args: run(args, torch.bfloat16)


def record(gpu: str, op: str) -> list[tuple[Any, ...]]:
    """Return (case, module, function, grid, arguments) of each launch, with tensors as in `packed`."""
    launches = []
    for case, run in cases(op):
        torch.manual_seed(0)
        with recording(GPUS[gpu]) as recorded:
            run()
        for launch in recorded:
            arguments = {name: packed(value) for name, value in launch.arguments.items()}
            launches.append((case, launch.kernel.fn.__module__, launch.name, launch.grid, arguments))
    return launches


def packed(value: Any) -> Any:
    """Return an argument of a launch so that it can be pickled, without memory."""
    if isinstance(value, TensorDescriptor):
        return {"dtype": value.base.dtype, "block": list(value.block_shape)}
    return torch.empty(0, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def unpacked(value: Any) -> Any:
    """Return an argument for the compiler from what `packed` returned."""
    if not isinstance(value, dict):
        return value
    base = torch.empty(value["block"], dtype=value["dtype"], device="meta")
    return TensorDescriptor(base, value["block"], [*base.stride()], value["block"])


def read(path: Path) -> Iterator[tuple[str, Launch]]:
    """Yield the case and the launch of each line in a file of `record`, with the kernel as this process compiles it."""
    for case, module, function, grid, arguments in pickle.loads(path.read_bytes()):
        arguments = {name: unpacked(value) for name, value in arguments.items()}
        yield case, Launch(getattr(import_module(module), function), grid, arguments)


def zeros(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function as `make`, which returns uninitialized tensors, but with zeros for integers."""

    def made(*args: Any, **options: Any) -> Tensor:
        y = make(*args, **options)
        return y if y.is_floating_point() else y.zero_()

    return made


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(owner, name, zeros(getattr(owner, name)))
    gpu, op, path = sys.argv[1:]
    Path(path).write_bytes(pickle.dumps(record(gpu, op)))
