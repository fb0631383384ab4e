"""The mixture-of-experts layer beside its peers: same process, rounds interleaved, medians.

`dense` is the yardstick: the same operations as plain products over all T·K rows. The others compute the layer: mm1,
transformers' two ways, a loop over experts, and Liger and megablocks where they are installed and there is a GPU.
"""

import functools
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.autotune.gpu_state import watched
from mm1.engine.data.record import DataError
from mm1.integrations.torchvision import declare_operators
from mm1.kernels.experts import cost, moe_mlp
from mm1.kernels.route import route, sort_by_expert

# (D, F, E, K)
LAYERS = {
    "mm1-3b-moe": (3072, 8064, 64, 2), "mm1-7b-moe": (4096, 13312, 32, 2), "mixtral-8x7b": (4096, 14336, 8, 2),
    "phi-3.5-moe": (4096, 6400, 16, 2), "olmoe": (2048, 1024, 64, 8), "qwen3-30b": (2048, 768, 128, 8),
}  # fmt: skip
CPU_LAYERS = {"coarse": (512, 1792, 8, 2), "fine": (512, 256, 64, 8)}
TOKENS, CPU_TOKENS = (16, 256, 2048, 8192, 32768), (16, 2048)
SKEWS = ("uniform", "zipf", "one")
Layer = tuple[int, int, int, int]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, index, weight, gate_up, down


def measure(rounds: int, layer: str | None = None) -> dict[str, Any]:
    """Seconds of forward, and of forward + backward, for every shape; prints a line each, returns the record."""
    gpu = torch.cuda.is_available()
    layers = LAYERS if gpu else CPU_LAYERS
    if rounds < 1 or (layer is not None and layer not in layers):
        known = ", ".join(layers)
        raise DataError(f"bench experts: rounds {rounds}, layer {layer}; expected 1 or more, and one of {known}")
    rows = []
    for name in [layer] if layer else layers:
        for tokens in TOKENS if gpu else CPU_TOKENS:
            for skew in SKEWS if gpu else SKEWS[:1]:
                row = watched(functools.partial(_row, layers[name], tokens, skew, rounds, "cuda" if gpu else "cpu"))
                rows.append({"layer": name, "tokens": tokens, "skew": skew, **row})
                _print(rows[-1], layers[name])
    return {"bench": "experts", **_machine(), "rows": rows}


def routing(tokens: int, experts: int, k: int, skew: str, device: str) -> tuple[Tensor, Tensor]:
    """index, weight of random routers: even, experts as frequent as 1 / rank, or one that every token chooses first."""
    # Gumbel noise: the largest are samples without replacement.
    logits = -torch.empty(tokens, experts, device=device).exponential_().log()
    if skew == "zipf":
        logits -= torch.arange(1, experts + 1, device=device).log()
    elif skew == "one":
        logits[:, 0] += 100
    chosen = route(logits, k)
    return chosen.index, chosen.weight


def _row(layer: Layer, tokens: int, skew: str, rounds: int, device: str) -> dict[str, Any]:
    D, width, E, K = layer
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    gate_up, down = new(E, 2 * width, D).mul_(D**-0.5), new(E, D, width).mul_(width**-0.5)
    arguments = new(tokens, D), *routing(tokens, E, K, skew, device), gate_up, down
    dy = new(tokens, D)
    seconds: dict[str, dict[str, float]] = {}
    for what, wrap in (("forward", _forward), ("forward+backward", _both)):
        runs = {"dense": _dense(arguments, what)}
        runs |= {name: wrap(peer(layer), arguments, dy) for name, peer in peers(device).items()}
        seconds[what] = _medians(runs, rounds, device)
    flops = cost(tokens, K, E, D, width).flops
    return {"seconds": seconds, "flops": {"forward": flops, "forward+backward": 3 * flops}}


def peers(device: str) -> dict[str, Callable[[Layer], Callable[..., Tensor]]]:
    found: dict[str, Callable[[Layer], Callable[..., Tensor]]] = {"mm1": lambda _: moe_mlp}
    if importlib.util.find_spec("transformers"):
        found["eager"] = functools.partial(_transformers, implementation="eager")
        found["grouped_mm"] = functools.partial(_transformers, implementation="grouped_mm")
    if device == "cuda":
        found["loop"] = lambda _: _loop
        if importlib.util.find_spec("liger_kernel"):
            found["liger"] = lambda _: _liger
        if importlib.util.find_spec("megablocks_ops"):
            found["megablocks"] = lambda _: _megablocks
    return found


def _transformers(layer: Layer, implementation: str) -> Callable[..., Tensor]:
    declare_operators()
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    D, width, E, K = layer
    config = MixtralConfig(hidden_size=D, intermediate_size=width, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)

    def run(x, index, weight, gate_up, down):
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, weights, (x, index.long(), weight.to(x.dtype)))

    return run


def _loop(x, index, weight, gate_up, down):
    """A product an expert, sizes on the host."""
    slots, position, offsets = sort_by_expert(index, len(down))
    rows = x[slots // index.shape[1]].split(offsets.diff(prepend=offsets.new_zeros(1)).tolist())
    parts = []
    for e, part in enumerate(rows):
        gate, up = F.linear(part, gate_up[e]).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up, down[e]))
    return (torch.cat(parts)[position.long()].float() * weight[..., None]).sum(1).to(x.dtype)


def _liger(x, index, weight, gate_up, down):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, gate_up, down, index, weight.to(x.dtype))


def _megablocks(x, index, weight, gate_up, down):
    from mm1.engine.experts import BACKENDS
    from mm1.kernels.route import Routing

    zero = x.new_zeros(())
    return BACKENDS["megablocks"]()(
        x, Routing(index, weight, sort_by_expert(index, len(down)), zero, zero, zero), gate_up, down
    )


def _forward(layer: Callable[..., Tensor], arguments: Arguments, dy: Tensor) -> Callable[[], Any]:
    def run():
        with torch.no_grad():
            return layer(*arguments)

    return run


def _both(layer: Callable[..., Tensor], arguments: Arguments, dy: Tensor) -> Callable[[], Any]:
    x, index, weight, gate_up, down = (t.detach().requires_grad_(t.is_floating_point()) for t in arguments)
    leaves = [x, weight, gate_up, down]
    return lambda: torch.autograd.grad(layer(x, index, weight, gate_up, down), leaves, dy)


def _dense(arguments: Arguments, what: str) -> Callable[[], Any]:
    x, index, _, gate_up, down = arguments
    rows = x.new_empty(index.numel(), x.shape[1]).normal_()
    hidden = x.new_empty(index.numel(), down.shape[2]).normal_()
    first, second = gate_up[0], down[0]

    def run():
        h, y = rows @ first.t(), hidden @ second.t()
        return (h, y) if what == "forward" else (h.t() @ rows, h @ first, y.t() @ hidden, y @ second)

    return run


def _medians(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Of interleaved rounds, caches flushed before each call; a peer that runs out of memory has none."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device == "cuda" else None
    taken: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            run()
            run()
            taken[name] = []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for r in range(rounds):
        for name in list(taken)[:: 1 if r % 2 else -1]:
            if flush is None:
                begin = time.perf_counter()
                runs[name]()
                taken[name].append(time.perf_counter() - begin)
            else:
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                runs[name]()
                end.record()
                end.synchronize()
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def _print(row: dict[str, Any], layer: Layer) -> None:
    print(f"{row['layer']} {layer}  T {row['tokens']}  {row['skew']}")
    for what, seconds in row["seconds"].items():
        rate = {name: row["flops"][what] / s / 1e12 for name, s in seconds.items()}
        parts = [f"{name} {1e3 * s:.2f} ms {rate[name] / rate['dense']:.0%}" for name, s in seconds.items()]
        print(f"  {what:17} {rate['dense']:.3g} TFLOP/s dense   " + "   ".join(parts))


def _machine() -> dict[str, Any]:
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "liger_kernel", "megablocks")}
    found = {"commit": git, "versions": versions, "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return found | {"device": f"{_processor()}, {torch.get_num_threads()} threads"}
    return found | {"device": torch.cuda.get_device_name()}


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    return getattr(__import__(name), "__version__", None) if importlib.util.find_spec(name) else None


if __name__ == "__main__":  # needs torch alone, for machines without the rest
    record = measure(rounds=20)
    folder = Path(__file__).parent / "results" / re.sub(r"\W+", "-", record["device"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experts.json").write_text(json.dumps(record, indent=1) + "\n")
