"""Load published weights into an MM1: CLIP and AIM vision towers, Honeybee's C-Abstractor, Llama-type decoders.

Tables map mm1's parameters to names in the source's state dict, to several names where mm1 fuses parameters. Each name
gets a view of mm1's parameter in the shape of the source, so that loading compares shapes and copies.
Names: transformers 5, models clip, llama, mistral, mixtral, qwen3, qwen3_moe; Cha et al. 2024 (Honeybee).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine.layers.config import Connector, Decoder, Vision
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.vision import ACTIVATIONS, VisionEncoder
from mm1.engine.models.aim import AIM
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import MM1Config
from mm1.errors import UserError

State = Mapping[str, Tensor]
Source = tuple[Any, State]  # a transformers config or its dict, and the state dict
Table = dict[str, str]  # module or parameter of mm1 -> names in the source, fused in this order; {e}: expert number

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
CLIP: Table = {
    "class_token": "embeddings.class_embedding", "patch_weight": "embeddings.patch_embedding.weight",
    "positions": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm",
    "blocks": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2",
    "qkv": QKV, "out": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
AIM_NAMES: Table = {  # of apple/ml-aim, version 1
    "patch_weight": "preprocessor.patchifier.proj.weight", "patch_bias": "preprocessor.patchifier.proj.bias",
    "patch_norm": "preprocessor.patchifier.norm",
    "blocks": "trunk.blocks", "norm1": "norm_1", "norm2": "norm_2",
    "qkv": "attn.qkv", "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "final_norm": "trunk.post_trunk_norm",
}  # fmt: skip
AIM_2 = r"preprocessor\.pos_embed|trunk\.blocks\.\d+\.mlp\.fc3\.weight"  # in files of version 2 alone
LLAMA: Table = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks": "model.layers", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attention.qkv": QKV, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
MIXTURES: tuple[Table, ...] = (  # names of transformers 5, and in the files of Qwen3-MoE and of Mixtral
    {"mlp.router": "mlp.gate", "mlp.down": "mlp.experts.down_proj",
     "mlp.gate_up": "mlp.experts.gate_up_proj"},
    {"mlp.router": "mlp.gate", "mlp.down": "mlp.experts.{e}.down_proj.weight",
     "mlp.gate_up": "mlp.experts.{e}.gate_proj.weight mlp.experts.{e}.up_proj.weight"},
    {"mlp.router": "block_sparse_moe.gate", "mlp.down": "block_sparse_moe.experts.{e}.w2.weight",
     "mlp.gate_up": "block_sparse_moe.experts.{e}.w1.weight block_sparse_moe.experts.{e}.w3.weight"},
)  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AIM_UNUSED = r"head\..*|trunk\.post_trunk_norm\..*"
CLIP_UNUSED = r".*position_ids|post_layernorm\..*|text_model\..*|(text|visual)_projection\..*|logit_scale"

# Defaults of fields that config.json leaves out, and the values of a field that mm1 supports.
CLIP_FIELDS = {
    "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
    "ffn": ("intermediate_size", 3072), "patch": ("patch_size", 32), "eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "quick_gelu"),
}  # fmt: skip
AIM_SUPPORTED = {"num_channels": (3,), "use_bias": (False,), "mlp_hidden_dim": (None,), "ffn_dropout_rate": (0.0,)}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP_SUPPORTED = {
    "model_type": ("clip_vision_model",), "hidden_act": tuple(ACTIVATIONS), "num_channels": (3,),
    "quantization_config": (None,),
}  # fmt: skip
CLIP_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size",
)  # fmt: skip
DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 4096}, "mixtral": {"rope_theta": 1_000_000.0},
    "qwen3": {"use_sliding_window": False, "head_dim": 128},
    "qwen3_moe": {"use_sliding_window": False, "norm_topk_prob": False},
}  # fmt: skip
DECODER_SUPPORTED = {
    "rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0, None),
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "quantization_config": (None,),
}  # fmt: skip
DECODER_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip
DECODER_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "norm_topk_prob")
COUNT, FLAG = "a positive integer", "True or False"
DECODER_COUNTS_OR_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


@torch.no_grad()
def from_hf(
    *, vision: Source | Vision | AIM, decoder: Source | Decoder, seed: int = 0,
    connector: State | Connector | None = None, image_tokens: int = 144, context: int | None = None,
) -> MM1:  # fmt: skip
    """Return an MM1 in fp32 with published weights.

    vision, decoder: (config, state dict) of transformers, or for AIM a config with the fields of its files: img_size,
    patch_size, embed_dim, num_blocks, num_heads, or an AIM of mm1, whose encoder is copied without its final norm;
    connector: Honeybee's state dict. A config of mm1 in place of these, or None for the connector, means random weights
    from `seed`. image_tokens: tokens of an image, which the connector's
    tensors do not show. context: limit of a document's tokens, which a sliding window must cover; None:
    max_position_embeddings. The smaller of both is the model's context. Raises UserError for a missing, unknown or
    unsupported field or tensor.
    """
    v, v_state = part_of("vision", _features_of(vision) if isinstance(vision, AIM) else vision, Vision, _vision)
    d, d_state = part_of("decoder", decoder, Decoder, lambda source: _decoder(source, context))
    c, c_state = _honeybee(connector, image_tokens) if isinstance(connector, Mapping) else (connector, None)
    c = c or Connector(tokens=image_tokens, position_grid=v.table)
    size, limits = v.table[0] * v.patch, [context] if context else []
    if d_state is not None and (trained := _config_of(decoder).get("max_position_embeddings")):
        limits.append(trained)
    whole = MM1Config(v, c, d, "squash", size, math.prod(v.table), context=min(limits, default=None))
    model = MM1(whole).init_weights(seed)
    if v_state is not None:
        (load_aim if v.patch_norm else _load_clip)(model.vision, v_state)
    if isinstance(vision, AIM):
        state = vision.vision.state_dict()
        model.vision.load_state_dict({name: state[name] for name in model.vision.state_dict()})
    if c_state is not None:
        _fill("connector", dict(model.connector.named_parameters()), c_state)
    if d_state is not None:
        _load_llama(model.decoder, d_state)
    return model


def part_of(part: str, source: Any, kind: type, read: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
    """Return the config of mm1 of a part, and its state dict, None for random weights. Raises UserError."""
    if isinstance(source, kind):
        return source, None
    try:
        return read(_config_of(source)), source[1]
    except KeyError as error:
        raise UserError(f"{part} config: {error.args[0]} is missing") from None


def _config_of(source: Any) -> dict[str, Any]:
    return dict(source[0]) if isinstance(source[0], Mapping) else source[0].to_dict()


def _expect(
    part: str, source: Mapping[str, Any], names: Iterable[str], valid: Callable[[Any], bool], expected: str
) -> None:
    """Raise UserError for a field of these names whose value is not valid."""
    for name in names:
        if name in source and not valid(source[name]):
            raise UserError(f"{part} config: {name} is {source[name]!r}, expected {expected}")


def _expect_supported(part: str, source: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    for name, values in supported.items():
        _expect(part, source, [name], values.__contains__, " or ".join(map(repr, values)))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_flag(value: Any) -> bool:
    return type(value) is bool  # "false" in quotes would count as true


def _vision(source: dict[str, Any]) -> Vision:
    if "num_blocks" in source:
        return aim_vision(source)
    if source["model_type"] == "clip":
        nested = source.get("vision_config_dict")  # in older files; transformers prefers it to vision_config
        nested = (source.get("vision_config") or {}) if nested is None else nested
        if not isinstance(nested, dict):
            raise UserError(f"vision config: vision_config is {nested!r}, expected an object")
        source = {"model_type": "clip_vision_model"} | nested
    _expect_supported("vision", source, CLIP_SUPPORTED)
    fields: dict[str, Any] = {name: source.get(*clip_name) for name, clip_name in CLIP_FIELDS.items()}
    side = source.get("image_size", 224)
    names = {clip_name: fields[name] for name, (clip_name, _) in CLIP_FIELDS.items()} | {"image_size": side}
    _expect("vision", names, CLIP_COUNTS, _is_count, COUNT)
    if side % fields["patch"]:
        raise UserError(f"vision config: image_size is {side}, expected a multiple of the patch_size {fields['patch']}")
    return Vision(table=(side // fields["patch"],) * 2, **fields)


def _features_of(aim: AIM) -> Vision:
    """Return the settings of an AIM's encoder for MM1, whose features are the last block's rows, before the norm."""
    c = aim.config
    side = c.image_size // c.vision.patch if c.image_mode == "squash" else math.isqrt(c.image_patches)
    return replace(c.vision, final_norm=False, table=(side, side))


def aim_vision(source: dict[str, Any]) -> Vision:
    """Return the encoder of a config of apple/ml-aim, without its final norm. Raises UserError, and KeyError."""
    _expect("vision", source, ["use_bias"], _is_flag, FLAG)
    _expect_supported("vision", source, AIM_SUPPORTED)
    width, patch, side = source["embed_dim"], source["patch_size"], source["img_size"]
    _expect("vision", source, ("embed_dim", "patch_size", "img_size", "num_blocks", "num_heads"), _is_count, COUNT)
    if side % patch:
        raise UserError(f"vision config: img_size is {side}, expected a multiple of the patch_size {patch}")
    return Vision(
        width, source["num_blocks"], source["num_heads"], round(source.get("mlp_ratio", 4) * width), patch,
        (side // patch,) * 2, activation="gelu", class_token=False, pre_norm=False, patch_norm=True,
        positions="sincos", bias=False, eps=1e-6, **IMAGENET,
    )  # fmt: skip


def _decoder(source: dict[str, Any], context: int | None) -> Decoder:
    kind = source["model_type"]
    _expect_supported("decoder", source, {"model_type": tuple(DECODER_DEFAULTS)})
    # Since transformers 5 theta is part of rope_parameters; the older rope_scaling has precedence there, and so here.
    rope = source.get("rope_scaling") or source.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"decoder config: rope_parameters are {rope!r}, expected one set for all layers")
    source = {"rope_theta": 10_000.0} | DECODER_DEFAULTS[kind] | source | rope
    _expect("decoder", source, DECODER_FLAGS, _is_flag, FLAG)
    _expect_supported("decoder", source, DECODER_SUPPORTED)
    if others := set(source.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        raise UserError(f"decoder config: layer_types has {min(others)!r}, expected full or sliding attention")
    _expect("decoder", source, DECODER_COUNTS, _is_count, COUNT)
    _expect("decoder", source, DECODER_COUNTS_OR_NULL, lambda value: value is None or _is_count(value), COUNT)
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    if window and window < (longest := context or source["max_position_embeddings"]):
        raise UserError(f"decoder config: sliding_window is {window}, expected {longest} or more")
    width, heads = source["hidden_size"], source["num_attention_heads"]
    mixture = kind in ("mixtral", "qwen3_moe")
    experts = source["num_experts" if "num_experts" in source else "num_local_experts"] if mixture else 0
    return Decoder(
        vocabulary=source["vocab_size"], width=width, layers=source["num_hidden_layers"], heads=heads,
        kv_heads=source.get("num_key_value_heads") or heads, eps=source["rms_norm_eps"],
        head_width=source.get("head_dim") or width // heads, rope_theta=source["rope_theta"],
        ffn=source["moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"],
        moe_every=1, experts=experts, experts_per_token=source["num_experts_per_tok"] if mixture else 0,
        qk_norm=kind.startswith("qwen3"),
        tied=source.get("tie_word_embeddings", False),
    )  # fmt: skip


def _honeybee(state: State, tokens: int) -> tuple[Connector, State]:
    """Return config and tensors of a C-Abstractor. Like Honeybee's it has no output norm."""
    state = {name.removeprefix("abstractor."): tensor for name, tensor in state.items()}
    names, grid = " ".join(state), None
    if "pos_emb" in state:
        side = math.isqrt(state["pos_emb"].shape[1])
        grid = (side, side)
        state["pos_emb"] = state["pos_emb"][:, -side * side :]  # older files have the class token's first
    depth, readout = (len(re.findall(p, names)) for p in (r"net\.0\.b\d+\.conv1\.conv", r"readout\.\d+\.w"))
    if not depth or not readout:
        raise UserError("connector: tensors net.0.b…, readout.… are missing, expected Honeybee's C-Abstractor")
    hidden = len(state["net.0.b1.conv1.conv.weight"])
    return Connector("c-abstractor", tokens, hidden, depth, readout, grid, output_norm=False), state


def _load_clip(encoder: VisionEncoder, state: State) -> None:
    c, views = encoder.config, views_of(encoder, CLIP)
    views[CLIP["patch_weight"]] = encoder.patch_weight.view(c.width, c.patch, c.patch, 3).permute(0, 3, 1, 2)
    views[CLIP["positions"]] = positions = torch.empty(1 + math.prod(c.table), c.width)  # the class token's first
    _fill("vision", views, {name.removeprefix("vision_model."): state[name] for name in state}, CLIP_UNUSED)
    encoder.class_token.add_(positions[0])
    encoder.positions.copy_(positions[1:].view_as(encoder.positions))


def load_aim(encoder: VisionEncoder, state: State) -> None:
    """Copy the state dict of apple/ml-aim, version 1, into an encoder. Raises UserError, also for version 2."""
    if newer := next((name for name in state if re.fullmatch(AIM_2, name)), None):
        raise UserError(f"vision: tensor {newer} is of AIM version 2, expected version 1")
    _fill("vision", aim_views(encoder), state, AIM_UNUSED)


def aim_views(encoder: VisionEncoder) -> dict[str, Tensor]:
    """Return views of an AIM's encoder by the names and in the shapes of apple/ml-aim."""
    c, views = encoder.config, views_of(encoder, AIM_NAMES)
    views[AIM_NAMES["patch_weight"]] = encoder.patch_weight.view(c.width, c.patch, c.patch, 3).permute(0, 3, 1, 2)
    return views


def _load_llama(decoder: DecoderLM, state: State) -> None:
    c, table, embedding = decoder.config, LLAMA, decoder.embedding.weight
    if c.experts:
        first = {f"model.layers.0.{mixture['mlp.down']}".format(e=0): mixture for mixture in MIXTURES}
        table = LLAMA | next((first[name] for name in first if name in state), MIXTURES[0])
    views = views_of(decoder, table, (c.kv_heads, c.head_width))
    _fill("decoder", views, state, r".*rotary_emb\.inv_freq" + r"|lm_head\.weight" * c.tied, grouped=True)
    if c.tied and not torch.equal(state.get("lm_head.weight", embedding).to(embedding), embedding):
        raise UserError("decoder: tensor lm_head.weight differs from the embedding, expected both to be the same")


def views_of(module: nn.Module, table: Table, heads: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Return a view of a parameter for each name of the source: equal parts along the first axis.

    table: names by module or parameter; heads: (key-value heads G, head width Dh) if attention.qkv is grouped by
    key-value head, whose views are then [G, …, Dh, D].
    """
    views = {}
    for path, parameter in module.named_parameters():
        *block, name = re.split(r"^(blocks\.\d+\.)", path)  # ["", "blocks.3.", name], or only the name
        prefix = "".join(block).replace("blocks", table["blocks"])
        stem, dot, kind = name.rpartition(".")
        sources = table[name].split() if name in table else [s + dot + kind for s in table[stem].split()]
        for e, whole in enumerate(parameter if "{e}" in sources[0] else [parameter]):
            if heads and stem == "attention.qkv":
                groups = whole.view(heads[0], -1, heads[1], whole.shape[1])
                parts = groups.split([groups.shape[1] - 2, 1, 1], dim=1)
            else:
                parts = whole.split(len(whole) // len(sources))
            views |= {prefix + source.format(e=e): part for source, part in zip(sources, parts)}
    return views


def _fill(part: str, views: Mapping[str, Tensor], state: State, unused: str = "", grouped: bool = False) -> None:
    """Copy each tensor of `state` into its view. Raises UserError for one that is missing, mis-shaped or unknown.

    unused: regular expression of names to ignore; grouped: whether the first three axes of a view with four axes are
    one axis in `state`.
    """
    for name, view in views.items():
        shape = (view[..., 0].numel(), view.shape[-1]) if grouped and view.ndim == 4 else tuple(view.shape)
        actual = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        if actual != (expected := f"of shape {shape}"):
            raise UserError(f"{part}: tensor {name} is {actual}, expected {expected}")
        if state[name].dtype not in FLOATS:  # quantized: its scale may be in another tensor
            dtype = state[name].dtype
            raise UserError(f"{part}: tensor {name} is of dtype {dtype}, expected floats of 16 bits or more")
        view.copy_(state[name].reshape(view.shape))
    for name in state:
        if name not in views and not re.fullmatch(unused, name):
            raise UserError(f"{part}: tensor {name} is unknown, expected only tensors that the config implies")
