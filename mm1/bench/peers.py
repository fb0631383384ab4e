"""List other implementations of the same ops; each is optional, and checked before it is timed.

A way is a call with its own parameters, whose results and gradients can be compared with this project's.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.bench.ops import TABLE, Attention, Leaves, MoeMlp, PagedAttention, PatchEmbed, QwenEmbed, Sizes
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
    """Holds a call (run), and maps of its result to this project's layout (packed) and of a gradient back (spread)."""

    run: Callable[[Leaves], Tensor]
    leaves: Leaves
    packed: Rows = field(default=lambda y: y)
    spread: Rows = field(default=lambda dy: dy)
    same: bool = True  # False: it is a yardstick, other products of as many operations


class Peer(NamedTuple):
    name: str
    ways: dict[str, Callable[[Any], Way]]  # by op
    module: str = "torch"
    gpu: bool = False


def missing(peer: Peer, device: str) -> str | None:
    """Return why the peer cannot run here, or None."""
    if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
        return "not installed"
    return "needs a GPU" if peer.gpu and device == "cpu" else None


def eager(problem: Any) -> Way:
    return Way(problem.plain, problem.leaves)


def compiled(problem: Any, mode: str | None = None) -> Way:
    torch.compiler.reset()
    return Way(torch.compile(problem.plain, mode=mode), problem.leaves)


def dense(products: Callable[[Leaves], Tensor], leaves: Leaves) -> Way:
    return Way(products, {name: leaf.detach().clone() for name, leaf in leaves.items()}, same=False)


def dense_experts(problem: MoeMlp) -> Way:
    """Return the yardstick that multiplies all T·K rows by one expert's weights."""
    L, x = problem.layer, problem.leaves["x"]
    rows = x.new_empty(len(x) * L.k, L.width).normal_()
    leaves = {"rows": rows, "gate_up": problem.leaves["gate_up"][0], "down": problem.leaves["down"][0]}

    def products(leaves: Leaves) -> Tensor:
        hidden = F.linear(leaves["rows"], leaves["gate_up"])
        return F.linear(hidden[:, : L.ffn], leaves["down"])

    return dense(products, leaves)


def dense_gemm(problem: Any) -> Way:
    return dense(lambda w: F.linear(w["a"], w["b"]), {"a": problem.leaves["a"], "b": problem.leaves["b"][0]})


def dense_embedding(problem: PatchEmbed) -> Way:
    leaves = problem.leaves
    return dense(lambda w: F.linear(problem.patches, w["weight"]), {"weight": leaves["weight"]})


def torch_grouped_gemm(problem: Any) -> Way:
    return Way(lambda w: F.grouped_mm(w["a"], w["b"].transpose(1, 2), offs=problem.offsets), problem.leaves)


def layer_of(name: str, problem: MoeMlp) -> Way:
    """Return the way of a backend of the engine."""
    backend = find(name)

    def run(w: Leaves) -> Tensor:
        zero = w["x"].new_zeros(())
        order = sort_by_expert(problem.index, problem.layer.experts)
        routing = Routing(problem.index, w["weight"], order, zero, zero, zero)
        return backend(w["x"], routing, w["gate_up"], w["down"])

    return Way(run, problem.leaves)


def transformers_experts(implementation: str, problem: MoeMlp) -> Way:
    declare_operators()
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    L = problem.layer
    config = MixtralConfig(
        hidden_size=L.width, intermediate_size=L.ffn, num_local_experts=L.experts, num_experts_per_tok=L.k
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    index = problem.index.long()

    def run(w: Leaves) -> Tensor:
        weights = {"gate_up_proj": w["gate_up"], "down_proj": w["down"]}
        return torch.func.functional_call(module, weights, (w["x"], index, w["weight"].to(w["x"].dtype)))

    return Way(run, problem.leaves)


def liger_experts(problem: MoeMlp) -> Way:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(w: Leaves) -> Any:
        return LigerFusedMoEFunction.apply(w["x"], w["gate_up"], w["down"], problem.index, w["weight"].to(w["x"].dtype))

    return Way(run, problem.leaves)


def liger_cross_entropy(problem: Any) -> Way:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return Way(lambda w: loss(w["weight"], w["x"], problem.targets), problem.leaves)


def chunked(problem: Any) -> Way:
    options = torch.nn.LinearCrossEntropyOptions()  # since torch 2.13
    targets = problem.targets.long()
    return Way(lambda w: F.linear_cross_entropy(w["x"], w["weight"], targets, options=options), problem.leaves)


def padded(rows: Tensor, sizes: Sizes) -> Tensor:
    longest = max(h * w for h, w in sizes)
    parts = rows.split([h * w for h, w in sizes])
    return torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])


def unpadded(y: Tensor, sizes: Sizes) -> Tensor:
    return torch.cat([image[: h * w] for image, (h, w) in zip(y, sizes)])


def embedding(module: nn.Module, call: Rows, names: dict[str, str], problem: PatchEmbed) -> Way:
    """Return the way of a module on padded patches, which are ready or cut and normalised in the call.

    names: the module's parameters by this project's names.
    """
    sizes, dtype = problem.sizes, problem.patches.dtype
    ready = None if problem.from_bytes else padded(problem.patches, sizes)
    module.to(problem.patches.device, dtype)
    parameters = dict(module.named_parameters())
    leaves: Leaves = {ours: parameters[theirs] for ours, theirs in names.items()}
    with torch.no_grad():
        for ours, leaf in leaves.items():
            leaf.copy_(problem.leaves[ours].view_as(leaf))
    return Way(
        lambda _: call(padded(problem.cut(dtype), sizes) if ready is None else ready), leaves,
        packed=lambda y: unpadded(y, sizes), spread=lambda dy: padded(dy, sizes),
    )  # fmt: skip


def siglip2(problem: PatchEmbed) -> Way:
    declare_operators()
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    width = len(problem.leaves["weight"])
    config = Siglip2VisionConfig(hidden_size=width, patch_size=problem.patch, num_patches=TABLE**2)
    module = Siglip2VisionEmbeddings(config)
    shapes = torch.tensor(problem.sizes)  # on the host, where it does not wait for a GPU
    names = {
        "weight": "patch_embedding.weight",
        "bias": "patch_embedding.bias",
        "pos_embed": "position_embedding.weight",
    }
    return embedding(module, lambda x: module(x, shapes), names, problem)


def qwen(problem: QwenEmbed) -> Way:
    declare_operators()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

    weight = problem.leaves["weight"]
    module = Qwen2_5_VisionPatchEmbed(patch_size=problem.patch, embed_dim=len(weight)).to(weight.device, weight.dtype)
    with torch.no_grad():
        module.proj.weight.copy_(weight.view_as(module.proj.weight))
    return Way(lambda _: module(problem.patches), {"weight": module.proj.weight})


def naflex(problem: PatchEmbed) -> Way:
    declare_operators()
    from timm.models.naflexvit import NaFlexEmbeds

    width, sizes = len(problem.leaves["weight"]), problem.sizes
    module = NaFlexEmbeds(
        patch_size=problem.patch, embed_dim=width, proj_type="linear", class_token=False, pos_embed="learned",
        pos_embed_grid_size=(TABLE, TABLE), pos_embed_interp_mode="bilinear",
    )  # fmt: skip
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes]
    coordinates = padded(torch.cat(places), sizes).to(problem.patches.device)
    valid = padded(torch.ones(len(problem.patches), 1, dtype=torch.bool), sizes)[..., 0].to(problem.patches.device)
    names = {"weight": "proj.weight", "bias": "proj.bias", "pos_embed": "pos_embed"}
    return embedding(module, lambda x: module(x, coordinates, valid)[0], names, problem)


def stage(problem: Any, blocks: int) -> Any:
    declare_operators()
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    width = problem.leaves["x"].shape[1]
    return RegStage(depth=blocks, in_chs=width, out_chs=width, stride=1, dilation=1, act_layer=nn.SiLU,
                    norm_layer=LayerNorm2d)  # fmt: skip


def timm_net(module: nn.Module, prefix: str, problem: Any) -> Way:
    """Return the way of timm's module of images [N, C, h, w] with this project's parameters."""
    x = problem.leaves["x"]
    module.to(x.device, x.dtype)
    state = problem.module.state_dict()
    module.load_state_dict({name.removeprefix(prefix): leaf for name, leaf in state.items()})
    leaves = {"x": x.detach().clone(), **{prefix + name: leaf for name, leaf in module.named_parameters()}}
    shape = len(problem.sizes) * problem.side**2 if hasattr(problem, "side") else len(x), x.shape[1]
    return Way(lambda w: by_size(w["x"], runs(problem.sizes), shape, module), leaves)


def timm_block(problem: Any) -> Way:
    return timm_net(stage(problem, 1).b1, "", problem)


def timm_abstractor(problem: Any) -> Way:
    net = nn.Sequential(stage(problem, 3), nn.AdaptiveAvgPool2d(problem.side), stage(problem, 3))
    return timm_net(net, "net.", problem)


def backend(name: str, problem: Attention) -> Way:
    return Way(partial(problem.ours, backend=name), problem.leaves)


def gathered(problem: PagedAttention) -> Way:
    """Attend to keys and values that are in order already, as in a cache without pages."""
    leaves = {name: leaf if name == "q" else problem.gathered(leaf) for name, leaf in problem.leaves.items()}
    return Way(problem.attend, leaves)


def varlen_gathered(problem: PagedAttention) -> Way:
    """Attend to keys and values in order, without padding to the longest document, by torch's varlen attention."""
    from torch.nn.attention.varlen import varlen_attn

    leaves = dict(problem.leaves)
    for name in ("k", "v"):
        whole = problem.gathered(leaves[name])
        leaves[name] = torch.cat([rows[:length] for rows, length in zip(whole, problem.lengths)])
    cu_k, longest = F.pad(problem.used.cumsum(0), (1, 0)).int(), problem.lengths[0]

    def run(w: Leaves) -> Any:
        return varlen_attn(w["q"], w["k"], w["v"], problem.cu_seqlens, cu_k, 1, longest, enable_gqa=True)

    return Way(run, leaves)


def flash_pages(problem: PagedAttention) -> Way:
    """Attend to scattered pages of 256 tokens by flash-attn, which takes no smaller ones."""
    from flash_attn import flash_attn_with_kvcache

    batch, most = len(problem.lengths), cdiv(problem.lengths[0], 256)
    order = torch.randperm(batch * most, device=problem.used.device)
    table, leaves = order.view(batch, most).int(), dict(problem.leaves)
    for name in ("k", "v"):
        whole = problem.gathered(leaves[name])
        pages = F.pad(whole, (0, 0, 0, 0, 0, most * 256 - whole.shape[1])).unflatten(1, (most, 256)).flatten(0, 1)
        leaves[name] = pages[order.argsort()]
    return Way(
        lambda w: flash_attn_with_kvcache(
            w["q"][:, None], w["k"], w["v"], cache_seqlens=problem.used, block_table=table
        )[:, 0], leaves,
    )  # fmt: skip


PLAIN = ("moe_mlp", "patch_embed", "c_abstractor", "grouped_gemm", "attention", "embed_patches", "qwen_embed",
         "conv_block", "route", "adaptive_pool", "linear_cross_entropy", "paged_attention")  # fmt: skip
EMBEDDINGS = ("patch_embed", "embed_patches")
PEERS = [
    Peer("dense", {"moe_mlp": dense_experts, "grouped_gemm": dense_gemm, **dict.fromkeys(EMBEDDINGS, dense_embedding)}),
    Peer("torch", dict.fromkeys(PLAIN, eager)),
    Peer("compiled", dict.fromkeys(PLAIN, compiled)),
    Peer("max-autotune", dict.fromkeys(PLAIN, partial(compiled, mode="max-autotune-no-cudagraphs"))),
    Peer("grouped_mm", {"grouped_gemm": torch_grouped_gemm, "moe_mlp": partial(layer_of, "torch")}),
    Peer("torch gathered", {"paged_attention": gathered}),
    Peer("varlen gathered", {"paged_attention": varlen_gathered}, gpu=True),
    Peer("torch chunked", {"linear_cross_entropy": chunked}),
    Peer("transformers", {**dict.fromkeys(EMBEDDINGS, siglip2), "qwen_embed": qwen}, "transformers"),
    *(
        Peer(f"transformers {name}", {"moe_mlp": partial(transformers_experts, name)}, "transformers")
        for name in ("eager", "grouped_mm")
    ),
    Peer("timm", {**dict.fromkeys(EMBEDDINGS, naflex), "conv_block": timm_block, "c_abstractor": timm_abstractor},
         "timm"),
    Peer("liger", {"moe_mlp": liger_experts, "linear_cross_entropy": liger_cross_entropy}, "liger_kernel", gpu=True),
    Peer("megablocks", {"moe_mlp": partial(layer_of, "megablocks")}, "megablocks", gpu=True),
    *(Peer(name, {"attention": partial(backend, name)}, gpu=name != "segments")
      for name in BACKENDS if name not in ("reference", "flash", "flash3", "xformers")),
    Peer("flash-attn", {"attention": partial(backend, "flash"), "paged_attention": flash_pages}, "flash_attn",
         gpu=True),
    Peer("flash-attn 3", {"attention": partial(backend, "flash3")}, "flash_attn_interface", gpu=True),
    Peer("xformers", {"attention": partial(backend, "xformers")}, "xformers", gpu=True),
]  # fmt: skip
COMPILED = ("compiled", "max-autotune")  # a minute each on a CPU: there only when asked for
