"""List other implementations of the same ops. Each is optional, and checked before it is timed.

A way is an implementation of a problem with its own parameters, whose results and gradients can be compared with mm1's.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.bench.image_sizes import Sizes
from mm1.bench.ops import TABLE, Leaves, Problem
from mm1.integrations.torchvision import declare_operators
from mm1.kernels.abstractor.reference import by_size
from mm1.kernels.attention.backends import BACKENDS
from mm1.kernels.dispatch import cdiv
from mm1.kernels.moe.backends import find
from mm1.kernels.moe.routing import Routing, sort_by_expert
from mm1.kernels.patches.reference import runs

Rows = Callable[[Tensor], Tensor]


@dataclass
class Way:
    """Hold an implementation of a problem."""

    run: Callable[[Leaves], Tensor]
    leaves: Leaves
    packed: Rows = field(default=lambda y: y)  # brings its result into mm1's layout
    spread: Rows = field(default=lambda dy: dy)  # brings a gradient of the result into its own layout
    same: bool = True  # False: a yardstick, which computes other products with as many operations


class Peer(NamedTuple):
    """Hold the implementations that one library has."""

    name: str
    ways: dict[str, Callable[[Problem], Way]]  # by op
    module: str = "torch"  # must be installed
    gpu: bool = False  # whether it needs a GPU


def missing(peer: Peer, device: str) -> str | None:
    """Return why the peer cannot run here, or None."""
    if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
        return "not installed"
    return "needs a GPU" if peer.gpu and device == "cpu" else None


def compiled(problem: Problem, mode: str | None = None) -> Way:
    """Return plain torch, compiled."""
    torch.compiler.reset()
    return Way(torch.compile(problem.plain, mode=mode), problem.leaves)


def dense(products: Callable[[Leaves], Tensor], leaves: Leaves) -> Way:
    """Return a yardstick that computes these dense products."""
    return Way(products, {name: leaf.detach().clone() for name, leaf in leaves.items()}, same=False)


def dense_experts(problem: Problem) -> Way:
    """Return the yardstick that multiplies all T·K rows by one expert's weights."""
    L, x = problem.inputs.layer, problem.leaves["x"]
    rows = x.new_empty(len(x) * L.k, L.width).normal_()
    leaves = {"rows": rows, "gate_up": problem.leaves["gate_up"][0], "down": problem.leaves["down"][0]}

    def products(leaves: Leaves) -> Tensor:
        hidden = F.linear(leaves["rows"], leaves["gate_up"])
        return F.linear(hidden[:, : L.ffn], leaves["down"])

    return dense(products, leaves)


def layer_of(name: str, problem: Problem) -> Way:
    """Return one of mm1's backends for experts."""
    backend, index, count = find(name), problem.inputs.index, problem.inputs.layer.experts

    def run(w: Leaves) -> Tensor:
        zero = w["x"].new_zeros(())
        routing = Routing(index, w["weight"], sort_by_expert(index, count), zero, zero, zero)
        return backend(w["x"], routing, w["gate_up"], w["down"])

    return Way(run, problem.leaves)


def transformers_experts(implementation: str, problem: Problem) -> Way:
    """Return one of transformers' implementations of experts."""
    declare_operators()
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    L = problem.inputs.layer
    config = MixtralConfig(
        hidden_size=L.width, intermediate_size=L.ffn, num_local_experts=L.experts, num_experts_per_tok=L.k
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    index = problem.inputs.index.long()

    def run(w: Leaves) -> Tensor:
        weights = {"gate_up_proj": w["gate_up"], "down_proj": w["down"]}
        return torch.func.functional_call(module, weights, (w["x"], index, w["weight"].to(w["x"].dtype)))

    return Way(run, problem.leaves)


def liger_experts(problem: Problem) -> Way:
    """Return Liger's experts."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(w: Leaves) -> Any:
        weight = w["weight"].to(w["x"].dtype)
        return LigerFusedMoEFunction.apply(w["x"], w["gate_up"], w["down"], problem.inputs.index, weight)

    return Way(run, problem.leaves)


def liger_cross_entropy(problem: Problem) -> Way:
    """Return Liger's cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return Way(lambda w: loss(w["weight"], w["x"], problem.inputs.targets), problem.leaves)


def chunked(problem: Problem) -> Way:
    """Return torch's cross-entropy in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()  # since torch 2.13
    targets = problem.inputs.targets.long()
    return Way(lambda w: F.linear_cross_entropy(w["x"], w["weight"], targets, options=options), problem.leaves)


def padded(rows: Tensor, sizes: Sizes) -> Tensor:
    """Return packed rows [P, …] as [N, longest, …]."""
    longest = max(h * w for h, w in sizes)
    parts = rows.split([h * w for h, w in sizes])
    return torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])


def unpadded(y: Tensor, sizes: Sizes) -> Tensor:
    """Return padded rows [N, longest, …] as [P, …]."""
    return torch.cat([image[: h * w] for image, (h, w) in zip(y, sizes)])


def embedding(module: nn.Module, call: Rows, names: dict[str, str], problem: Problem) -> Way:
    """Return a module that embeds padded patches. The call includes cutting and normalising if mm1's does.

    names: names of the module's parameters by mm1's names.
    """
    sizes, patches, cut = problem.inputs.sizes, problem.inputs.patches, problem.inputs.cut
    dtype, ready = patches.dtype, None if cut else padded(patches, sizes)
    module.to(patches.device, dtype)
    parameters = dict(module.named_parameters())
    leaves: Leaves = {ours: parameters[theirs] for ours, theirs in names.items()}
    with torch.no_grad():
        for ours, leaf in leaves.items():
            leaf.copy_(problem.leaves[ours].view_as(leaf))
    return Way(
        lambda _: call(padded(cut(dtype), sizes) if ready is None else ready), leaves,
        packed=lambda y: unpadded(y, sizes), spread=lambda dy: padded(dy, sizes),
    )  # fmt: skip


def siglip2(problem: Problem) -> Way:
    """Return transformers' embedding of SigLIP 2."""
    declare_operators()
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    width = len(problem.leaves["weight"])
    config = Siglip2VisionConfig(hidden_size=width, patch_size=problem.inputs.patch, num_patches=TABLE**2)
    module = Siglip2VisionEmbeddings(config)
    shapes = torch.tensor(problem.inputs.sizes)  # on the host, so that reading it does not wait for a GPU
    names = {"weight": "patch_embedding.weight", "bias": "patch_embedding.bias",
             "pos_embed": "position_embedding.weight"}  # fmt: skip
    return embedding(module, lambda x: module(x, shapes), names, problem)


def qwen(problem: Problem) -> Way:
    """Return transformers' embedding of Qwen-VL."""
    declare_operators()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

    weight = problem.leaves["weight"]
    module = Qwen2_5_VisionPatchEmbed(patch_size=problem.inputs.patch, embed_dim=len(weight))
    module.to(weight.device, weight.dtype)
    with torch.no_grad():
        module.proj.weight.copy_(weight.view_as(module.proj.weight))
    return Way(lambda _: module(problem.inputs.patches), {"weight": module.proj.weight})


def naflex(problem: Problem) -> Way:
    """Return timm's embedding of NaFlexVit."""
    declare_operators()
    from timm.models.naflexvit import NaFlexEmbeds

    width, sizes, patches = len(problem.leaves["weight"]), problem.inputs.sizes, problem.inputs.patches
    module = NaFlexEmbeds(
        patch_size=problem.inputs.patch, embed_dim=width, proj_type="linear", class_token=False, pos_embed="learned",
        pos_embed_grid_size=(TABLE, TABLE), pos_embed_interp_mode="bilinear",
    )  # fmt: skip
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes]
    coordinates = padded(torch.cat(places), sizes).to(patches.device)
    valid = padded(torch.ones(len(patches), 1, dtype=torch.bool), sizes)[..., 0].to(patches.device)
    names = {"weight": "proj.weight", "bias": "proj.bias", "pos_embed": "pos_embed"}
    return embedding(module, lambda x: module(x, coordinates, valid)[0], names, problem)


def stage(problem: Problem, blocks: int) -> Any:
    """Return timm's stage of `blocks` blocks as Honeybee builds it."""
    declare_operators()
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    width = problem.leaves["x"].shape[1]
    return RegStage(depth=blocks, in_chs=width, out_chs=width, stride=1, dilation=1, act_layer=nn.SiLU,
                    norm_layer=LayerNorm2d)  # fmt: skip


def timm_net(module: nn.Module, prefix: str, problem: Problem) -> Way:
    """Return timm's module, which takes images [N, C, h, w] of one size at a time, with mm1's parameters."""
    x, side, sizes = problem.leaves["x"], problem.inputs.side, problem.inputs.sizes
    module.to(x.device, x.dtype)
    state = problem.inputs.module.state_dict()
    module.load_state_dict({name.removeprefix(prefix): leaf for name, leaf in state.items()})
    leaves = {"x": x.detach().clone(), **{prefix + name: leaf for name, leaf in module.named_parameters()}}
    shape = len(sizes) * side**2 if side else len(x), x.shape[1]
    return Way(lambda w: by_size(w["x"], runs(sizes), shape, module), leaves)


def timm_abstractor(problem: Problem) -> Way:
    """Return timm's stages, with the pool between them."""
    net = nn.Sequential(stage(problem, 3), nn.AdaptiveAvgPool2d(problem.inputs.side), stage(problem, 3))
    return timm_net(net, "net.", problem)


def gathered(problem: Problem) -> Way:
    """Return torch's attention to keys and values that are in order already, as in a cache without pages."""
    gather = problem.inputs.gathered
    leaves = {name: leaf if name == "q" else gather(leaf) for name, leaf in problem.leaves.items()}
    return Way(problem.inputs.attend, leaves)


def varlen_gathered(problem: Problem) -> Way:
    """Return torch's varlen attention to keys and values in order, without padding to the longest document."""
    from torch.nn.attention.varlen import varlen_attn

    leaves, inputs = dict(problem.leaves), problem.inputs
    for name in ("k", "v"):
        documents = zip(inputs.gathered(leaves[name]), inputs.lengths)
        leaves[name] = torch.cat([rows[:length] for rows, length in documents])
    cu_k, longest = F.pad(inputs.used.cumsum(0), (1, 0)).int(), inputs.lengths[0]

    def run(w: Leaves) -> Any:
        return varlen_attn(w["q"], w["k"], w["v"], inputs.cu_seqlens, cu_k, 1, longest, enable_gqa=True)

    return Way(run, leaves)


def flash_pages(problem: Problem) -> Way:
    """Return flash-attn's attention to scattered pages of 256 tokens, the smallest that it takes."""
    from flash_attn import flash_attn_with_kvcache

    leaves, inputs = dict(problem.leaves), problem.inputs
    batch, count = len(inputs.lengths), cdiv(inputs.lengths[0], 256)  # pages of each document
    order = torch.randperm(batch * count, device=inputs.used.device)
    table = order.view(batch, count).int()
    for name in ("k", "v"):
        rows = inputs.gathered(leaves[name])
        pages = F.pad(rows, (0, 0, 0, 0, 0, count * 256 - rows.shape[1])).unflatten(1, (count, 256)).flatten(0, 1)
        leaves[name] = pages[order.argsort()]

    def run(w: Leaves) -> Any:
        options = {"cache_seqlens": inputs.used, "block_table": table}
        return flash_attn_with_kvcache(w["q"][:, None], w["k"], w["v"], **options)[:, 0]

    return Way(run, leaves)


PLAIN = ("moe_mlp", "patch_embed", "c_abstractor", "grouped_gemm", "attention", "embed_patches", "qwen_embed",
         "conv_block", "route", "adaptive_pool", "linear_cross_entropy", "paged_attention", "patch_loss")  # fmt: skip
EMBEDDINGS = ("patch_embed", "embed_patches")


def _everywhere(way: Callable[[Problem], Way], ops: tuple[str, ...] = EMBEDDINGS) -> dict[str, Callable]:
    return dict.fromkeys(ops, way)


def _attention(backend: str) -> dict[str, Callable]:
    """Return one of mm1's backends for attention."""
    return {"attention": lambda p: Way(partial(p.ours, backend=backend), p.leaves)}


PEERS = [
    Peer("dense", {
        "moe_mlp": dense_experts,
        "grouped_gemm": lambda p: dense(
            lambda w: F.linear(w["a"], w["b"]), {"a": p.leaves["a"], "b": p.leaves["b"][0]}),
        **_everywhere(lambda p: dense(
            lambda w: F.linear(p.inputs.patches, w["weight"]), {"weight": p.leaves["weight"]})),
    }),
    Peer("torch", _everywhere(lambda p: Way(p.plain, p.leaves), PLAIN)),
    Peer("compiled", _everywhere(compiled, PLAIN)),
    Peer("max-autotune", _everywhere(partial(compiled, mode="max-autotune-no-cudagraphs"), PLAIN)),
    Peer("grouped_mm", {
        "grouped_gemm": lambda p: Way(
            lambda w: F.grouped_mm(w["a"], w["b"].transpose(1, 2), offs=p.inputs.offsets), p.leaves),
        "moe_mlp": partial(layer_of, "torch"),
    }),
    Peer("torch gathered", {"paged_attention": gathered}),
    Peer("varlen gathered", {"paged_attention": varlen_gathered}, gpu=True),
    Peer("torch chunked", {"linear_cross_entropy": chunked}),
    Peer("transformers", {**_everywhere(siglip2), "qwen_embed": qwen}, "transformers"),
    *(Peer(f"transformers {name}", {"moe_mlp": partial(transformers_experts, name)}, "transformers")
      for name in ("eager", "grouped_mm")),
    Peer("timm", {**_everywhere(naflex), "conv_block": lambda p: timm_net(stage(p, 1).b1, "", p),
                  "c_abstractor": timm_abstractor}, "timm"),
    Peer("liger", {"moe_mlp": liger_experts, "linear_cross_entropy": liger_cross_entropy}, "liger_kernel", gpu=True),
    Peer("megablocks", {"moe_mlp": partial(layer_of, "megablocks")}, "megablocks", gpu=True),
    *(Peer(name, _attention(name), gpu=name != "segments")
      for name in BACKENDS if name not in ("reference", "flash-attn", "flash-attn-3", "xformers")),
    Peer("flash-attn", {**_attention("flash-attn"), "paged_attention": flash_pages}, "flash_attn", gpu=True),
    Peer("flash-attn 3", _attention("flash-attn-3"), "flash_attn_interface", gpu=True),
    Peer("xformers", _attention("xformers"), "xformers", gpu=True),
]  # fmt: skip
COMPILED = ("compiled", "max-autotune")  # they take a minute each on a CPU, and run there only if they are named
