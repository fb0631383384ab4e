"""Patch embedding and C-Abstractor beside their peers: same process, rounds interleaved, medians.

Peers get what they ask for (patches cut and normalised, padded to the longest image); `from bytes` adds what it takes
to make that from the same uint8 pixels. budget: images resized to at most 256 patches, as SigLIP2's processor does;
native: 224 to 1344 pixels a side, six of which leave 41.5 % of rows padding to the longest; square: 378².
"""

import importlib.util
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.autotune.gpu_state import watched
from mm1.bench.experts import _machine, _medians
from mm1.engine.connector import CAbstractor
from mm1.engine.data.record import DataError
from mm1.integrations.torchvision import declare_operators
from mm1.kernels.grids import Grids
from mm1.kernels.patch_embed import cost, embed_patches, patch_embed

PATCH, TABLE = 14, 16
NATIVE = [(70, 51), (51, 41), (38, 75), (77, 81), (82, 77), (22, 50)]
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
Grid = tuple[int, int]
Run = Callable[..., Any]


def grids_of(regime: str, count: int) -> list[Grid]:
    draw = random.Random(0)
    if regime == "square":
        return [(27, 27)] * count
    if regime == "native":
        return [*NATIVE, *((draw.randint(16, 96), draw.randint(16, 96)) for _ in range(count - len(NATIVE)))]
    heights = [round(16 * math.exp(draw.uniform(-0.5, 0.5))) for _ in range(count)]
    return [(h, 256 // h) for h in heights]


def measure(rounds: int, row: str | None = None) -> dict[str, Any]:
    """Seconds of every row; prints a line each, returns the record."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    regimes = {"square": 64, "native": 64, "budget": 256} if gpu else {"budget": 16, "native": 6}
    mixed = [(20, 27), (27, 20), (12, 40), (27, 27), (9, 9), (33, 14), (24, 24), (16, 31)]
    known = {name: lambda name=name: _embedding(name, regimes[name], rounds, device) for name in regimes}
    known |= {
        name: lambda name=name, sizes=sizes: _abstractor(name, sizes * (8 if gpu else 1), rounds, device)
        for name, sizes in (("27x27", [(27, 27)] * 8), ("mixed", mixed))
        if importlib.util.find_spec("timm")  # whose weights it takes
    }
    if rounds < 1 or (row is not None and row not in known):
        raise DataError(f"bench vision: rounds {rounds}, row {row}; expected 1 or more, and one of {', '.join(known)}")
    return {"bench": "vision", **_machine(), "rows": [watched(known[name]) for name in ([row] if row else known)]}


def _embedding(regime: str, count: int, rounds: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype, width = (torch.bfloat16, 1280) if device == "cuda" else (torch.float32, 768)
    sizes, p = grids_of(regime, count), PATCH
    grids = Grids(sizes, device=device)
    pixels = torch.randint(0, 256, (grids.patches * p * p, 3), dtype=torch.uint8, device=device)
    new = lambda *shape: torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)  # noqa: E731
    weight, bias, table = new(width, p * p * 3), new(width), new(TABLE, TABLE, width)
    leaves = [weight, bias, table]
    patches = _normalised(_cut(pixels, sizes)).to(dtype)
    longest = max(h * w for h, w in sizes)
    dy = torch.randn(grids.patches, width, device=device, dtype=dtype)

    def packed() -> Tensor:
        return embed_patches(patches, grids, weight, bias, table)

    def fused() -> Tensor:
        return patch_embed(pixels, grids, weight, bias, table, patch_size=p, mean=MEAN, std=STD)[0]

    runs: dict[str, tuple[Run, Any]] = {"mm1": (packed, leaves), "mm1 from bytes": (fused, leaves)}
    padded_dy = _padded(dy, sizes, longest)
    for name, peer in {"transformers": _siglip2, "timm": _naflex}.items():
        if importlib.util.find_spec(name) is None:
            continue
        call, own = peer(weight, bias, table, sizes, device)
        prepared = _padded(patches, sizes, longest)
        runs[name] = (lambda call=call, x=prepared: call(x), own)
        runs[f"{name} from bytes"] = (
            lambda call=call: call(_padded(_normalised(_cut(pixels, sizes)).to(dtype), sizes, longest)), own
        )  # fmt: skip
        with torch.no_grad():
            found = torch.cat([y[: h * w] for y, (h, w) in zip(call(prepared), sizes)])
            error = ((found - packed()).norm() / found.norm()).item()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{name}: {error}"
    gradient = lambda y: dy if y.ndim == 2 else padded_dy  # noqa: E731
    row = {"row": f"patch embedding, {regime}", "images": count, "patches": grids.patches, "width": width}
    row["flops"] = cost(grids.patches, width, p, table=TABLE**2).flops
    return _timed(row, runs, gradient, rounds, device)


def _timed(row: dict[str, Any], runs, gradient, rounds: int, device: str) -> dict[str, Any]:
    def forward(call: Run) -> Run:
        def run():
            with torch.inference_mode():
                return call()

        return run

    def both(call: Run, leaves: list[Tensor]) -> Run:
        def run():
            y = call()
            return torch.autograd.grad(y, leaves, gradient(y))

        return run

    row["seconds"] = {
        "forward": _medians({n: forward(call) for n, (call, _) in runs.items()}, rounds, device),
        "forward+backward": _medians({n: both(*run) for n, run in runs.items()}, rounds, device),
    }
    print(row["row"])
    for what, seconds in row["seconds"].items():
        print(f"  {what:17}" + "   ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items()))
    return row


def _cut(pixels: Tensor, sizes: list[Grid]) -> Tensor:
    parts = pixels.split([h * w * PATCH**2 for h, w in sizes])
    return torch.cat([
        part.view(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, -1) for part, (h, w) in zip(parts, sizes)
    ])  # fmt: skip


def _normalised(patches: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN, device=patches.device), torch.tensor(STD, device=patches.device)
    return ((patches.float() / 255).view(-1, 3) - mean).div_(std).view(len(patches), -1)


def _padded(rows: Tensor, sizes: list[Grid], longest: int) -> Tensor:
    parts = rows.split([h * w for h, w in sizes])
    return torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])


def _siglip2(weight: Tensor, bias: Tensor, table: Tensor, sizes: list[Grid], device: str):
    declare_operators()
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    module = Siglip2VisionEmbeddings(
        Siglip2VisionConfig(hidden_size=len(weight), patch_size=PATCH, num_patches=TABLE**2)
    ).to(device, weight.dtype)
    with torch.no_grad():
        module.patch_embedding.weight.copy_(weight)
        module.patch_embedding.bias.copy_(bias)
        module.position_embedding.weight.copy_(table.flatten(0, 1))
    shapes = torch.tensor(sizes)  # on the host, where it does not wait for a GPU
    return lambda x: module(x, shapes), list(module.parameters())


def _naflex(weight: Tensor, bias: Tensor, table: Tensor, sizes: list[Grid], device: str):
    declare_operators()
    from timm.models.naflexvit import NaFlexEmbeds

    module = NaFlexEmbeds(
        patch_size=PATCH, embed_dim=len(weight), proj_type="linear", class_token=False, pos_embed="learned",
        pos_embed_grid_size=(TABLE, TABLE), pos_embed_interp_mode="bilinear",
    ).to(device, weight.dtype)  # fmt: skip
    module.load_state_dict({"proj.weight": weight, "proj.bias": bias, "pos_embed": table[None]})
    longest = max(h * w for h, w in sizes)
    coordinates = torch.stack([
        F.pad(torch.cartesian_prod(torch.arange(h), torch.arange(w)), (0, 0, 0, longest - h * w)) for h, w in sizes
    ]).to(device)  # fmt: skip
    valid = torch.stack([torch.arange(longest) < h * w for h, w in sizes]).to(device)
    return lambda x: module(x, coordinates, valid)[0], [p for p in module.parameters() if p.requires_grad]


def _abstractor(name: str, sizes: list[Grid], rounds: int, device: str) -> dict[str, Any]:
    """Stage, pool and stage of width 1024, without readout."""
    declare_operators()
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    torch.manual_seed(0)
    dtype, width = torch.bfloat16 if device == "cuda" else torch.float32, 1024
    stage = lambda: RegStage(depth=3, in_chs=width, out_chs=width, stride=1, dilation=1, act_layer=nn.SiLU,  # noqa: E731
                             norm_layer=LayerNorm2d)  # fmt: skip
    timm = nn.Sequential(stage(), nn.AdaptiveAvgPool2d(12), stage()).to(device, dtype)
    ours = CAbstractor(width, 8, hidden=width).to(device, dtype)
    ours.load_state_dict({f"net.{k}": v for k, v in timm.state_dict().items()}, strict=False)
    ours.readout = nn.Sequential()
    grids = Grids(sizes, device=device)
    x = torch.randn(grids.patches, width, device=device, dtype=dtype)
    dy = torch.randn(len(sizes) * 144, width, device=device, dtype=dtype)
    equal = len(set(sizes)) == 1

    def theirs(module: Callable[[Tensor], Tensor]) -> Tensor:
        parts = x.split([h * w * (len(sizes) if equal else 1) for h, w in (sizes[:1] if equal else sizes)])
        outs = [
            module(part.view(-1, h, w, width).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).flatten(0, 1)
            for part, (h, w) in zip(parts, sizes)
        ]
        return torch.cat(outs)

    with torch.no_grad():
        error = ((ours(x, grids) - theirs(timm)).norm() / theirs(timm).norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
    runs = {
        "mm1": (lambda: ours(x, grids), list(ours.parameters())),
        "timm": (lambda: theirs(timm), list(timm.parameters())),
    }
    if device == "cuda" and equal:
        best = torch.compile(timm, mode="max-autotune")
        runs["timm compiled"] = (lambda: theirs(best), list(timm.parameters()))
    row = {"row": f"c-abstractor, {name}", "images": len(sizes), "patches": grids.patches, "width": width}
    return _timed(row, runs, lambda y: dy, rounds, device)


if __name__ == "__main__":  # for machines with a GPU, their own torch, and the peers
    record = measure(rounds=20)
    folder = Path(__file__).parent / "results" / re.sub(r"\W+", "-", record["device"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vision.json").write_text(json.dumps(record, indent=1) + "\n")
