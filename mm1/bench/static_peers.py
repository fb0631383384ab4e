"""Record the launches of other libraries' Triton kernels without a GPU, to compile them beside mm1's.

Their Python code runs with tensors on the device "meta"; a launch is recorded instead of run. Where a library measures
several configurations at its first call, each is a candidate, in the order of the cost model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm1.kernels.cost_model import Product, expert_tiles
from mm1.kernels.device import Device
from mm1.kernels.dispatch import Launch, cdiv

TOKENS, EXPERTS, K, WIDTH, FFN = 8192, 64, 2, 3072, 8064  # MM1-3B-MoE
LOGITS, VOCABULARY = 256, 100352  # rows and columns
TRIED = 4  # candidates to compile until one is sound
Candidate = tuple[Launch, Product | None]  # without a prediction: None


class Peer(NamedTuple):
    """Hold the kernels that a library has for an op."""

    name: str
    op: str
    module: str
    kernels: Callable[[Device], Iterator[tuple[str, Iterator[Candidate]]]]  # (name of mm1's case, candidates)


class _Numbers(TorchDispatchMode):
    """Answer reads of values, which tensors on "meta" do not have, with a number of tiles."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return TOKENS * K // 64 + EXPERTS
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Record launches of Triton kernels in the block, as pairs of kernel and arguments by name."""
    from triton.runtime.jit import KernelInterface

    launches: list[tuple[Any, dict[str, Any]]] = []

    def record(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: launches.append((kernel, dict(zip(kernel.arg_names, args)) | kwargs))

    with patch.object(KernelInterface, "__getitem__", record), _Numbers():
        yield launches


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def liger_experts(device: Device) -> Iterator[tuple[str, Iterator[Candidate]]]:
    """Yield the products of Liger's experts, forward and backward."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    shapes = (TOKENS, WIDTH), (EXPERTS, 2 * FFN, WIDTH), (EXPERTS, WIDTH, FFN), (TOKENS, K)
    leaves = [_empty(*shape).requires_grad_() for shape in shapes]
    with recorded() as launches:
        y: Any = LigerFusedMoEFunction.apply(*leaves[:3], _empty(TOKENS, K, dtype=torch.int32), leaves[3])
        torch.autograd.grad(y, leaves, _empty(TOKENS, WIDTH))
    for kernel, arguments in launches:
        if product := LIGER.get(kernel.fn.__name__):
            yield product.case, _candidates(kernel, arguments, product, device)


class _Sizes(NamedTuple):
    """Hold the sizes of one of Liger's products, all of whose operands are loaded by addresses."""

    case: str
    depth: int  # 0: the rows of an expert, which are summed
    columns: int
    sums: int = 1  # results of a program for each of its columns
    finish: float = 1.0
    rows: int = 0  # of the result of each expert; 0: the expert's rows

    def work(self, block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Product:
        """Return the work of the product in tiles of this size."""
        slots = TOKENS * K
        down = EXPERTS * cdiv(self.rows, block_m) if self.rows else expert_tiles(slots, EXPERTS, block_m)[0]
        n, weights = block_n * self.sums, EXPERTS * (self.rows or self.depth) * self.columns * self.sums
        moved = (
            slots * (self.rows + self.depth + self.columns * self.sums * (1 if self.rows else self.finish)) + weights
        )
        operands = (block_m + n) * block_k
        return Product(
            down * cdiv(self.columns, block_n), self.depth or slots // EXPERTS, block_m, n, block_k, warps, stages,
            2 * operands * stages, 2 * moved, 2, addressed=operands, finish=self.finish, finishing=5.5,
        )  # fmt: skip


LIGER = {
    "_fused_up_proj_swiglu_kernel": _Sizes("up", WIDTH, FFN, sums=2, finish=1.5),
    "_fused_down_proj_kernel": _Sizes("down", FFN, WIDTH),
    "_moe_bwd_down_proj_kernel": _Sizes("dh", WIDTH, FFN, finish=5),
    "_moe_bwd_dX_expanded_kernel": _Sizes("dx", 2 * FFN, WIDTH),
    "_moe_bwd_dW1_kernel": _Sizes("dgate_up", 0, 2 * FFN, rows=WIDTH),
    "_moe_bwd_dW2_kernel": _Sizes("ddown", 0, WIDTH, rows=FFN),
}


def _candidates(kernel: Any, arguments: dict[str, Any], sizes: _Sizes, device: Device) -> Iterator[Candidate]:
    """Yield the launches of an autotuned kernel's configurations with their work, the fastest by prediction first."""
    pairs: list[tuple[float, Launch, Product]] = []
    for config in kernel.configs:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        full = {**arguments, **config.kwargs, **options}
        work = sizes.work(full["BLOCK_M"], full["BLOCK_N"], full["BLOCK_K"], *options.values())
        if work.shared <= device.shared:
            pairs.append((work.seconds(device), Launch(kernel.fn, 1, full), work))
    return ((launch, work) for _, launch, work in islice(sorted(pairs, key=lambda pair: pair[0]), TRIED))


def liger_cross_entropy(device: Device) -> Iterator[tuple[str, Iterator[Candidate]]]:
    """Yield Liger's kernel that turns logits into losses and gradients."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    with recorded() as launches:
        fused_linear_cross_entropy_forward(
            _empty(LOGITS, 64), _empty(VOCABULARY, 64), _empty(LOGITS, dtype=torch.int64)
        )
    kernel, arguments = launches[0]
    yield "losses", iter([(Launch(kernel, 1, arguments), None)])


HEADS, KV_HEADS, LENGTH, DOCUMENTS, HEAD_WIDTH = 32, 8, 2048, 4, 128  # of static.py's decoder


def fla_attention(device: Device) -> Iterator[tuple[str, Iterator[Candidate]]]:
    """Yield flash-linear-attention's kernels for softmax attention, which is causal, with the tiles it has for Hopper.

    The arguments are its own wrapper's, which asks for the shared memory of a GPU that must be there.
    """
    from fla.ops.attn import parallel

    tile = {"BT": 128, "BS": 64, "BK": HEAD_WIDTH, "BV": HEAD_WIDTH}
    wide, narrow = ((DOCUMENTS, LENGTH, heads, HEAD_WIDTH) for heads in (HEADS, KV_HEADS))
    lse = _empty(DOCUMENTS, LENGTH, HEADS, dtype=torch.float32)
    full = {
        **dict.fromkeys(("g_cumsum", "sink_bias", "cu_seqlens", "chunk_indices", "W", "dg_cumsum")),
        **dict.fromkeys(("USE_G", "USE_SINK_BIAS", "USE_WINDOW", "IS_VARLEN"), False), **tile,
        **dict.fromkeys(("q", "o", "do", "dq", "dk", "dv"), _empty(*wide)), "k": _empty(*narrow), "v": _empty(*narrow),
        "lse": lse, "delta": lse, "scale": HEAD_WIDTH**-0.5, "T": LENGTH, "B": DOCUMENTS, "H": KV_HEADS, "HQ": HEADS,
        "G": HEADS // KV_HEADS, "K": HEAD_WIDTH, "V": HEAD_WIDTH, "num_warps": 8,
    }  # fmt: skip
    elements = DOCUMENTS * LENGTH * (HEADS + KV_HEADS) * HEAD_WIDTH
    for kernel, products in (("fwd_kernel", 2), ("bwd_kernel_dq", 3), ("bwd_kernel_dkv", 4)):
        function: Any = getattr(parallel, f"parallel_attn_{kernel}").fn
        fetched = 2 * tile["BS"] * HEAD_WIDTH
        work = Product(
            DOCUMENTS * HEADS * cdiv(LENGTH, tile["BT"]), HEAD_WIDTH * LENGTH // tile["BS"] // 2, tile["BT"],
            tile["BS"], HEAD_WIDTH, 8, 3, 0, 4 * elements, 2, fetched, fetched, products=products, finishing=12,
        )  # fmt: skip
        arguments = {name: full[name] for name in (*function.arg_names, "num_warps")}
        yield f"{DOCUMENTS} documents", iter([(Launch(function, 1, arguments), work)])


PEERS = [
    Peer("liger", "moe_mlp", "liger_kernel", liger_experts),
    Peer("liger", "linear_cross_entropy", "liger_kernel", liger_cross_entropy),
    Peer("fla", "attention", "fla", fla_attention),
]
