"""An MM1 of published weights: CLIP vision towers, Honeybee's C-Abstractor, Llama-type decoders.

Tables map our parameters to the names in the source's state dict, several names where we fuse what the source keeps
apart. Each name gets a view of our parameter in the source's shape, so that loading is comparing shapes and copying.
Names: transformers 5, models clip, llama, mistral, mixtral, qwen3, qwen3_moe; Cha et al. 2024 (Honeybee).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine import config
from mm1.engine.data.record import DataError
from mm1.engine.decoder import DecoderLM
from mm1.engine.model import MM1
from mm1.engine.vision import ACTIVATIONS, VisionEncoder

State = Mapping[str, Tensor]
Source = tuple[Any, State]  # a transformers config or its dict, and the state dict
Table = dict[str, tuple[str, ...]]  # our module or parameter -> what it is fused of, in layer {i}, expert {e}

_LAYER = "encoder.layers.{i}"
CLIP: Table = {
    "class_token": ("embeddings.class_embedding",),
    "patch_weight": ("embeddings.patch_embedding.weight",),
    "positions": ("embeddings.position_embedding.weight",),
    "pre_norm": ("pre_layrnorm",),  # sic
    "norm1": (f"{_LAYER}.layer_norm1",),
    "qkv": tuple(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"),
    "out": (f"{_LAYER}.self_attn.out_proj",),
    "norm2": (f"{_LAYER}.layer_norm2",),
    "fc1": (f"{_LAYER}.mlp.fc1",),
    "fc2": (f"{_LAYER}.mlp.fc2",),
}
_LAYER = "model.layers.{i}"
LLAMA: Table = {
    "embedding": ("model.embed_tokens",),
    "norm1": (f"{_LAYER}.input_layernorm",),
    "attention.qkv": tuple(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"),
    "attention.q_norm": (f"{_LAYER}.self_attn.q_norm",),
    "attention.k_norm": (f"{_LAYER}.self_attn.k_norm",),
    "attention.out": (f"{_LAYER}.self_attn.o_proj",),
    "norm2": (f"{_LAYER}.post_attention_layernorm",),
    "mlp.gate_up": (f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"),
    "mlp.down": (f"{_LAYER}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
MIXTURES: list[Table] = [
    {
        "mlp.router": (f"{_LAYER}.{mlp}.gate.weight",),
        "mlp.gate_up": tuple(f"{_LAYER}.{mlp}.experts.{name}" for name in gate_up),
        "mlp.down": (f"{_LAYER}.{mlp}.experts.{down}",),
    }
    for mlp, gate_up, down in (  # transformers 5 in memory; files of Mixtral; files of Qwen3-MoE
        ("mlp", ["gate_up_proj"], "down_proj"),
        ("block_sparse_moe", ["{e}.w1.weight", "{e}.w3.weight"], "{e}.w2.weight"),
        ("mlp", ["{e}.gate_proj.weight", "{e}.up_proj.weight"], "{e}.down_proj.weight"),
    )
]
CLIP_UNUSED = r".*position_ids|post_layernorm\..*|text_model\..*|(text|visual)_projection\..*|logit_scale"
LLAMA_UNUSED = r".*rotary_emb\.inv_freq"

# What a field means that config.json leaves out, and the values of a field that mean what this engine computes.
CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
CLIP_HONOURED = {"model_type": ("clip_vision_model",), "hidden_act": tuple(ACTIVATIONS), "num_channels": (3,)}
DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10_000.0},
    "mistral": {"rope_theta": 10_000.0, "sliding_window": 4096},
    "mixtral": {"rope_theta": 1_000_000.0},
    "qwen3": {"rope_theta": 10_000.0, "use_sliding_window": False, "head_dim": 128},
    "qwen3_moe": {"rope_theta": 10_000.0, "use_sliding_window": False, "norm_topk_prob": False},
}
DECODER_HONOURED = {
    "rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,), "hidden_act": ("silu",),
    "attention_bias": (False,), "mlp_bias": (False,), "norm_topk_prob": (True,), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}  # fmt: skip


@torch.no_grad()
def from_hf(
    *,
    vision: Source | config.Vision,
    decoder: Source | config.Decoder,
    connector: State | config.Connector | None = None,
    image_tokens: int = 144,
    context: int | None = None,
    seed: int = 0,
) -> MM1:
    """A model in fp32 of (config, state dict) of transformers for vision and decoder, and Honeybee's state dict.

    A part given as a config of ours is initialised from `seed`; so is the connector if it is None. image_tokens: the
    connector's, which no tensor tells. context: the longest document, by which a sliding window is judged, None for
    max_position_embeddings. Raises DataError for a field or tensor that is missing, unknown or not supported.
    """
    v, vision_state = _part("vision", vision, config.Vision, _vision)
    d, decoder_state = _part("decoder", decoder, config.Decoder, lambda source: _decoder(source, context))
    connector_state = None
    if connector is None:
        connector = config.Connector(tokens=image_tokens, position_grid=v.table)
    elif not isinstance(connector, config.Connector):
        connector, connector_state = _honeybee(connector, image_tokens)
    size = {"image_size": v.table[0] * v.patch, "image_patches": math.prod(v.table)}
    model = MM1(config.Model(v, connector, d, **size)).initialize(seed)
    if vision_state is not None:
        _load_clip(model.vision, vision_state)
    if connector_state is not None:
        _fill("connector", dict(model.connector.named_parameters()), connector_state)
    if decoder_state is not None:
        _load_llama(model.decoder, decoder_state)
    return model


def _part(part: str, given: Any, kind: type, read: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
    """Our config, and the state dict if there is one."""
    if isinstance(given, kind):
        return given, None
    source, state = given
    try:
        return read(dict(source) if isinstance(source, Mapping) else source.to_dict()), state
    except KeyError as error:
        raise DataError(f"{part} config: {error.args[0]} is missing") from None


def _expect(part: str, source: dict[str, Any], honoured: Mapping[str, tuple]) -> None:
    for name, values in honoured.items():
        if name in source and source[name] not in values:
            expected = " or ".join(map(repr, values))
            raise DataError(f"{part} config: {name} is {source[name]!r}, expected {expected}")


def _vision(source: dict[str, Any]) -> config.Vision:
    if source["model_type"] == "clip":
        source = {"model_type": "clip_vision_model"} | source["vision_config"]
    source = CLIP_DEFAULTS | source
    _expect("vision", source, CLIP_HONOURED)
    side = source["image_size"] // source["patch_size"]
    return config.Vision(
        width=source["hidden_size"], layers=source["num_hidden_layers"], heads=source["num_attention_heads"],
        ffn=source["intermediate_size"], patch=source["patch_size"], table=(side, side),
        activation=source["hidden_act"], eps=source["layer_norm_eps"],
    )  # fmt: skip


def _decoder(source: dict[str, Any], context: int | None) -> config.Decoder:
    kind = source["model_type"]
    _expect("decoder", source, {"model_type": tuple(DECODER_DEFAULTS)})
    # transformers 5 keeps theta among rope_parameters; before, it stood beside a rope_scaling.
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    source = DECODER_DEFAULTS[kind] | source | rope
    _expect("decoder", source, DECODER_HONOURED)
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    if window and window < (longest := context or source["max_position_embeddings"]):
        raise DataError(f"decoder config: sliding_window is {window}, expected at least the context {longest}")
    width, heads = source["hidden_size"], source["num_attention_heads"]
    experts = source.get("num_experts") or source.get("num_local_experts") or 0
    return config.Decoder(
        vocabulary=source["vocab_size"], width=width, layers=source["num_hidden_layers"], heads=heads,
        kv_heads=source.get("num_key_value_heads") or heads, eps=source["rms_norm_eps"],
        ffn=source.get("moe_intermediate_size") or source["intermediate_size"],
        head_width=source.get("head_dim") or width // heads, rope_theta=source["rope_theta"],
        tied=bool(source.get("tie_word_embeddings")), qk_norm=kind.startswith("qwen3"), moe_every=1,
        experts=experts, experts_per_token=source["num_experts_per_tok"] if experts else 0,
    )  # fmt: skip


def _honeybee(state: State, tokens: int) -> tuple[config.Connector, State]:
    """Sizes and tensors of a C-Abstractor, without our norm after it: its readout was trained without one."""
    state = {name.removeprefix("abstractor."): tensor for name, tensor in state.items()}
    first, grid = "net.0.b1.conv1.conv.weight", None
    if first not in state:
        raise DataError(f"connector: tensor {first} is missing")
    if "pos_emb" in state:
        side = math.isqrt(state["pos_emb"].shape[1])
        grid = (side, side)
        state["pos_emb"] = state["pos_emb"][:, -side * side :]  # older files begin with one for the class token
    depth, readout_depth = (
        sum(re.fullmatch(pattern, name) is not None for name in state)
        for pattern in (r"net\.0\.b\d+\.conv1\.conv\.weight", r"readout\.\d+\.weight")
    )
    hidden = len(state[first])
    return config.Connector("c-abstractor", tokens, hidden, depth, readout_depth, grid, False), state


def _load_clip(encoder: VisionEncoder, state: State) -> None:
    c, views = encoder.config, _views(encoder, CLIP)
    (kernel,), (table,) = CLIP["patch_weight"], CLIP["positions"]
    views[kernel] = views[kernel].view(c.width, c.patch, c.patch, 3).permute(0, 3, 1, 2)
    views[table] = positions = torch.empty(1 + math.prod(c.table), c.width)  # the class token's comes first
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    _fill("vision", views, state, CLIP_UNUSED)
    encoder.class_token.add_(positions[0])
    encoder.positions.copy_(positions[1:].view_as(encoder.positions))


def _load_llama(decoder: DecoderLM, state: State) -> None:
    c, table = decoder.config, LLAMA
    if c.experts:
        table = LLAMA | next((m for m in MIXTURES if m["mlp.down"][0].format(i=0, e=0) in state), MIXTURES[0])
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    views = _views(decoder, table, {"attention.qkv": [q, kv, kv]})
    _fill("decoder", views, state, LLAMA_UNUSED + r"|lm_head\.weight" * c.tied)
    embedding = decoder.embedding.weight
    if c.tied and not torch.equal(state.get("lm_head.weight", embedding).to(embedding), embedding):
        raise DataError("decoder: tensor lm_head.weight is not the embedding, expected by tie_word_embeddings")


def _views(module: nn.Module, table: Table, sizes: Mapping[str, list[int]] = {}) -> dict[str, Tensor]:
    """Source name -> its part of our parameter: parts are equal along the first axis if not in `sizes`."""
    views = {}
    for path, parameter in module.named_parameters():
        *layer, name = re.split(r"^blocks\.(\d+)\.", path)  # ["", number] in a block, else nothing
        stem, _, kind = name.rpartition(".")
        names = table[name] if name in table else [f"{source}.{kind}" for source in table[stem]]
        for e, whole in enumerate(parameter if "{e}" in names[0] else [parameter]):
            parts = whole.split(sizes.get(stem) or len(whole) // len(names))
            views |= {name.format(i="".join(layer), e=e): part for name, part in zip(names, parts)}
    return views


def _fill(part: str, views: Mapping[str, Tensor], state: State, unused: str = "") -> None:
    """Copy each tensor into its view. DataError if one is missing, mis-shaped or left over."""
    for name, view in views.items():
        if name not in state:
            raise DataError(f"{part}: tensor {name} is missing, expected of shape {tuple(view.shape)}")
        if state[name].shape != view.shape:
            found, expected = tuple(state[name].shape), tuple(view.shape)
            raise DataError(f"{part}: tensor {name} has shape {found}, expected {expected}")
        view.copy_(state[name])
    for name in state:
        if name not in views and not re.fullmatch(unused, name):
            raise DataError(f"{part}: tensor {name} is left over, expected only tensors that the config implies")
