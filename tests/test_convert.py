"""Converted weights compute what transformers computes with them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, relative_error
from small import logits_of

from mm1.engine.convert.weights import CLIP_FIELDS, DECODER_DEFAULTS, from_hf
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.layers.config import Connector, Decoder, Vision
from mm1.engine.layers.connector import CAbstractor
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids

transformers = pytest.importorskip("transformers")

SMALL_VISION = Vision(width=24, layers=1, heads=2, ffn=32, table=(2, 2))
SMALL_DECODER = Decoder(vocabulary=32, width=24, layers=1, heads=2, kv_heads=1, ffn=32, head_width=12)
SMALL_CONNECTOR = Connector(tokens=4, hidden=16, depth=1, position_grid=(2, 2))
ROPE = {"rope_theta": 50_000.0, "rope_type": "default"}
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_parameters": ROPE,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
MIXTURE = {"num_experts_per_tok": 2, "rope_parameters": ROPE | {"rope_theta": 2e6}}
DECODERS = {
    "llama": ("Llama", {}),
    "llama, tied, one key head": ("Llama", TIED | {"head_dim": 20, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 64}),
    "mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 4}),
    "qwen3": ("Qwen3", TIED | {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        MIXTURE | {"num_experts": 4, "moe_intermediate_size": 56, "norm_topk_prob": True},
    ),
}


def randomized(model):
    """Far from initial values: norms are not ones, biases are not zero, logits are not flat."""
    for name, p in model.named_parameters():
        if p.ndim < 2:
            torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        else:
            torch.nn.init.normal_(p, 0.0, 1.5 * p.shape[-1] ** -0.5)
    return model.float().eval()


def clip(**options):
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    c = transformers.CLIPVisionConfig(**{"patch_size": 14, "image_size": 28} | sizes | options)
    return randomized(transformers.CLIPVisionModel(c))


def decoder(name):
    kind, options = DECODERS[name]
    c = getattr(transformers, f"{kind}Config")(**SIZES | options)
    return randomized(getattr(transformers, f"{kind}ForCausalLM")(c))


def of_vision(hf_config, state):
    return from_hf(vision=(hf_config, state), decoder=SMALL_DECODER, connector=SMALL_CONNECTOR).vision


def of_decoder(hf_config, state, **options):
    vision, connector = SMALL_VISION, SMALL_CONNECTOR
    return from_hf(vision=vision, connector=connector, decoder=(hf_config, state), **options)


def normalized(images):
    """uint8 [N, H, W, 3] -> what CLIP's processor feeds, [N, 3, H, W]."""
    c = SMALL_VISION
    return ((images / 255 - torch.tensor(c.mean)) / torch.tensor(c.std)).permute(0, 3, 1, 2)


def features(encoder, images):
    """[N, P, Dv] of N equal images in one packed call."""
    n, height, width, _ = images.shape
    return encoder(images.reshape(-1, 3), Grids([(height // 14, width // 14)] * n)).unflatten(0, (n, -1))


def pictures(n, height, width):
    return torch.randint(256, (n, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("width, side", [(128, 28), (160, 42)], ids=["heads of 64, 2x2", "heads of 80, 3x3"])
def test_clip_is_transformers(activation, width, side):
    model = clip(hidden_size=width, image_size=side, hidden_act=activation)
    encoder = of_vision(model.config, model.state_dict())
    images = pictures(3, side, side)
    truth = model(normalized(images), output_hidden_states=True).hidden_states[-1][:, 1:]
    found = features(encoder, images)
    assert relative_error(found, truth) < 1e-4
    layer, embeddings = model.encoder.layers[0], model.embeddings
    theirs = gradients(truth, [
        layer.self_attn.k_proj.weight, layer.mlp.fc1.bias, embeddings.patch_embedding.weight,
        embeddings.position_embedding.weight, embeddings.class_embedding,
    ])  # fmt: skip
    names = ["blocks.0.qkv.weight", "blocks.0.fc1.bias", "patch_weight", "positions", "class_token"]
    weights = dict(encoder.named_parameters())
    qkv, fc1, patch, positions, token = gradients(found, [weights[name] for name in names])
    ours = [
        qkv[width : 2 * width], fc1, patch.view(width, 14, 14, 3).permute(0, 3, 1, 2),
        torch.cat([token[None], positions.flatten(0, 1)]), token,
    ]  # fmt: skip
    for a, b in zip(ours, theirs):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("rows, columns", [(5, 7), (2, 2), (2, 6)])
def test_clip_at_another_grid_has_torchs_antialiased_positions(rows, columns):
    """Not those of transformers: its bicubic has no filter, and a coefficient of -0.75 for -0.5."""
    model = clip(image_size=42)
    encoder, images = of_vision(model.config, model.state_dict()), pictures(2, 14 * rows, 14 * columns)

    def resampled(embeddings, height, width):
        weight = model.embeddings.position_embedding.weight
        table = weight[1:].T.reshape(1, -1, 3, 3)
        table = F.interpolate(table, (height // 14, width // 14), mode="bicubic", antialias=True)
        return torch.cat([weight[:1], table[0].flatten(1).T])[None]

    model.embeddings.interpolate_pos_encoding = resampled
    options = {"output_hidden_states": True, "interpolate_pos_encoding": True}
    truth = model(normalized(images), **options).hidden_states[-1][:, 1:]
    assert relative_error(features(encoder, images), truth) < 1e-4


def test_clip_loads_from_every_place_it_is_kept_in():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    c = transformers.CLIPConfig(
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        text_config=sizes | tokens,
        projection_dim=8,
    )
    model = randomized(transformers.CLIPModel(c))
    state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    alone = {name.removeprefix("vision_model."): value for name, value in state.items() if "vision_model" in name}
    whole, tower = of_vision(c, state), of_vision(c.vision_config, alone)
    projected = of_vision(c.to_dict(), {k: v for k, v in state.items() if k.startswith("vis")})
    images = pictures(1, 28, 28)
    truth = model.vision_model(normalized(images), output_hidden_states=True).hidden_states[-1][:, 1:]
    for encoder in (whole, tower, projected):
        assert relative_error(features(encoder, images), truth) < 1e-4


@pytest.mark.parametrize("nested", [
    {"vision_config_dict": "small", "vision_config": {"hidden_size": 999, "layer_norm_eps": 0.5}},
    {"vision_config_dict": "small", "vision_config": None},
    {"vision_config_dict": "small"},
    {"vision_config_dict": None, "vision_config": "small"},
], ids=["beside another", "beside nothing", "alone", "null"])  # fmt: skip
def test_an_older_clip_config_is_read_as_transformers_reads_it(nested):
    model = clip(hidden_size=32, layer_norm_eps=1e-3)
    small = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "patch_size": 14, "image_size": 28, "layer_norm_eps": 1e-3}  # fmt: skip
    fields = {"model_type": "clip"} | {name: small if value == "small" else value for name, value in nested.items()}
    truth = transformers.CLIPConfig(**json.loads(json.dumps(fields))).vision_config
    assert {name: getattr(truth, name) for name in small} == small
    images = pictures(1, 28, 28)
    features_of = model(normalized(images), output_hidden_states=True).hidden_states[-1][:, 1:]
    assert relative_error(features(of_vision(fields, model.state_dict()), images), features_of) < 1e-4


def test_a_clip_config_without_its_vision_is_the_default_one():
    with pytest.raises(UserError, match=r"patch_embedding.weight is missing, expected of shape \(768, 3, 32, 32\)"):
        of_vision({"model_type": "clip"}, {})


TWO_ROPES = {
    "a scaling of null": {"rope_scaling": None},
    "an empty scaling": {"rope_scaling": {}},
    "a default scaling with a theta": {"rope_scaling": {"rope_type": "default", "rope_theta": 300.0}},
    "a default scaling without": {"rope_scaling": {"type": "default"}},
    "theta beside both": {"rope_scaling": {"type": "default"}, "rope_theta": 700.0},
    "theta beside rope_parameters": {"rope_theta": 700.0},
}


@pytest.mark.parametrize("name", TWO_ROPES)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_fields_of_rope_are_read_as_transformers_reads_them(kind, name):
    fields = json.loads(json.dumps(decoder(kind).config.to_dict(), default=str)) | TWO_ROPES[name]
    kind = type(decoder(kind))
    theirs = randomized(kind(kind.config_class.from_dict(json.loads(json.dumps(fields)))))
    documents, batch = packed([30])
    truth = theirs(documents[0][None]).logits[0]
    ours = of_decoder(fields, theirs.state_dict())
    assert ours.config.decoder.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert relative_error(logits_of(ours, batch), truth) < 1e-4


def packed(lengths):
    """Random tokens of each document, int64, and the batch of them all."""
    documents = [Document(np.random.default_rng(n).integers(2, 97, n, np.int32), (), "") for n in lengths]
    batch = pack(documents, exact_budget(documents, 14), image_id=1, patch=14, slots=4)
    return [torch.from_numpy(document.tokens).long() for document in documents], batch


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_transformers_document_by_document(name):
    model = decoder(name)
    ours = of_decoder(model.config, model.state_dict())
    documents, batch = packed([9, 1, 17, 4])
    truth = torch.cat([model(tokens[None]).logits[0] for tokens in documents])
    assert truth.std() > 0.1
    assert relative_error(logits_of(ours, batch), truth) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_its_gradients_are_transformers(name):
    model = decoder(name)
    ours = of_decoder(model.config, model.state_dict())
    documents, batch = packed([9, 17])
    each = [F.cross_entropy(model(t[None]).logits[0, :-1], t[1:], reduction="sum") for t in documents]
    truth, found = torch.stack(each).sum(), ours(batch).loss
    assert relative_error(found, truth) < 1e-4
    truth.backward()
    found.backward()
    layer, weights = model.model.layers[0], dict(ours.decoder.named_parameters())
    attention, mlp = layer.self_attn, layer.mlp
    pairs = {
        "embedding.weight": [model.model.embed_tokens.weight],
        "blocks.0.attention.out.weight": [attention.o_proj.weight],
    }
    if hasattr(mlp, "experts"):
        pairs |= {
            "blocks.0.mlp.router.weight": [mlp.gate.weight],
            "blocks.0.mlp.gate_up": [mlp.experts.gate_up_proj],
        }
    else:
        pairs |= {"blocks.0.mlp.gate.weight": [mlp.gate_proj.weight], "blocks.0.mlp.up.weight": [mlp.up_proj.weight]}
    for name, theirs in pairs.items():
        gradient = weights[name].grad
        assert gradient is not None
        assert relative_error(gradient, torch.cat([p.grad for p in theirs])) < 1e-4, name
    c = ours.config.decoder
    q, k, v = (getattr(attention, f"{part}_proj").weight.grad.unflatten(0, (c.kv_heads, -1)) for part in "qkv")
    by_head = torch.cat([q, k, v], dim=1).flatten(0, 1)
    assert relative_error(weights["blocks.0.attention.qkv.weight"].grad, by_head) < 1e-4


FILES = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


@pytest.mark.parametrize("name", FILES)
def test_mixtures_load_as_they_are_in_files(name):
    model = decoder(name)
    mlp, names = FILES[name]
    state = {}
    for key, value in model.state_dict().items():
        prefix, dot, last = key.replace(".mlp.", f".{mlp}.").rpartition(".")
        if last == "gate_up_proj":
            parts = {"gate": value.chunk(2, dim=1)[0], "up": value.chunk(2, dim=1)[1]}
        else:
            parts = {"down": value} if last == "down_proj" else {}
        state |= {f"{prefix}.{e}.{names[part]}.weight": w for part in parts for e, w in enumerate(parts[part])}
        if not parts:
            state[prefix + dot + last] = value
    found, truth = of_decoder(model.config, state), of_decoder(model.config, model.state_dict())
    for key, value in truth.decoder.state_dict().items():
        assert torch.equal(found.decoder.state_dict()[key], value), key


def test_older_files_hold_theta_and_buffers_elsewhere():
    model = decoder("llama")
    fields = model.config.to_dict()
    del fields["rope_parameters"]
    fields |= {"rope_theta": 777.0, "rope_scaling": None}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    assert of_decoder(fields, model.state_dict() | buffers).config.decoder.rope_theta == 777.0


def test_what_config_json_leaves_out_is_what_transformers_means():
    tower = transformers.CLIPVisionConfig().to_dict()
    assert {name: tower[name] for name, _ in CLIP_FIELDS.values()} == dict(CLIP_FIELDS.values())
    for kind, defaults in DECODER_DEFAULTS.items():
        fields = transformers.AutoConfig.for_model(kind)
        theta = defaults.get("rope_theta", 10_000.0)
        assert fields.rope_parameters["rope_theta"] == theta
        for name in set(defaults) - {"rope_theta"}:
            assert getattr(fields, name) == defaults[name], (kind, name)


def test_half_precision_files_become_fp32():
    model = decoder("llama").bfloat16()
    weight = of_decoder(model.config, model.state_dict()).decoder.state_dict()["blocks.0.mlp.down.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.model.layers[0].mlp.down_proj.weight.float())


@pytest.mark.parametrize("prefix, class_row", [("", 0), ("abstractor.", 1)])
def test_honeybee_connector_loads_with_its_sizes(prefix, class_row):
    truth = CAbstractor(24, 24, hidden=16, depth=2, tokens=4, readout_depth=3, position_grid=(3, 3))
    for p in truth.parameters():
        torch.nn.init.normal_(p)
    state = dict(truth.state_dict())
    state["pos_emb"] = torch.cat([torch.randn(1, class_row, 24), state["pos_emb"]], dim=1)
    state = {prefix + name: value for name, value in state.items()}
    model = from_hf(vision=SMALL_VISION, decoder=SMALL_DECODER, connector=state, image_tokens=4)
    x = torch.randn(4 + 15, 24)
    assert torch.equal(model.connector(x, [(2, 2), (3, 5)]), truth(x, [(2, 2), (3, 5)]))
    assert isinstance(model.image_norm, torch.nn.Identity)
    with pytest.raises(UserError, match=r"connector: tensor eos_tokens is unknown"):
        from_hf(vision=SMALL_VISION, decoder=SMALL_DECODER, connector=state | {"eos_tokens": x}, image_tokens=4)


def test_parts_that_are_not_given_are_initialised_from_the_seed():
    c = clip().config
    state = clip().state_dict()
    one, same, other = (
        from_hf(vision=(c, state), decoder=SMALL_DECODER, image_tokens=9, seed=seed) for seed in (1, 1, 2)
    )
    assert one.config.connector == Connector(tokens=9, position_grid=(2, 2))
    assert (one.config.image_size, one.config.image_patches) == (28, 4)
    one, same, other = (model.state_dict() for model in (one, same, other))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert torch.equal(one["vision.patch_weight"], other["vision.patch_weight"])
    for name in ("decoder.embedding.weight", "connector.readout.0.weight"):
        assert not torch.equal(one[name], other[name])


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
REFUSED_FIELDS = {
    "unknown model": ("llama", {"model_type": "gpt2"}, r"model_type is 'gpt2', expected 'llama' or"),
    "scaled rope": ("llama", {"rope_parameters": LLAMA3}, "rope_type is 'llama3', expected 'default'"),
    "scaled rope of older files": (
        "llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type is 'linear', expected",
    ),
    "scaled rope beside another": (
        "qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', expected 'default'",
    ),
    "dynamic rope beside another": ("llama", {"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic', expected"),
    "rope by layer": (
        "qwen3", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters are .*, expected one set for all",
    ),
    "rope that is none": ("llama", {"rope_scaling": "linear"}, "rope_parameters are 'linear', expected"),
    "partial rope of older files": ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    "attention by layer": (
        "qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'",
    ),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\], expected \[\]"),
    "every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*, expected"),
    "a size in words": ("llama", {"hidden_size": "48"}, "hidden_size is '48', expected a positive integer"),
    "no heads": ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
    "no size": ("llama", {"hidden_size": None}, "hidden_size is None, expected a positive integer"),
    "partial rope": (
        "llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias is True, expected False"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias is True, expected False"),
    "window": ("mistral", {"sliding_window": 32}, "sliding_window is 32, expected 64 or more"),
    "window of qwen": ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
    "unnormalised routing": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, expected"),
}  # fmt: skip


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, []], ids=repr)
@pytest.mark.parametrize("name, flag", [
    ("llama", "tie_word_embeddings"), ("llama", "attention_bias"), ("llama", "mlp_bias"),
    ("qwen3", "use_sliding_window"), ("qwen3_moe", "norm_topk_prob"),
])  # fmt: skip
def test_refuses_a_flag_that_is_neither_true_nor_false(name, flag, value):
    kind, options = DECODERS[name]
    fields = getattr(transformers, f"{kind}Config")(**SIZES | options).to_dict() | {flag: value}
    with pytest.raises(UserError, match=rf"^decoder config: {flag} is {re.escape(repr(value))}, expected True or Fal"):
        of_decoder(fields, {})


@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_refuses_what_it_does_not_compute(case):
    name, fields, message = REFUSED_FIELDS[case]
    model = decoder(name)
    with pytest.raises(UserError, match=rf"^decoder config: {message}") as caught:
        of_decoder(model.config.to_dict() | fields, model.state_dict())
    assert "\n" not in str(caught.value)


def test_refuses_a_missing_field():
    model = decoder("llama")
    fields = model.config.to_dict()
    del fields["num_hidden_layers"]
    with pytest.raises(UserError, match=r"^decoder config: num_hidden_layers is missing"):
        of_decoder(fields, model.state_dict())


def test_a_window_that_the_context_fits_in_is_honoured():
    model = decoder("mistral")
    fields = model.config.to_dict() | {"sliding_window": 32}
    assert of_decoder(fields, model.state_dict(), context=32).config.decoder.layers == 3
    with pytest.raises(UserError, match="sliding_window is 32, expected 33 or more"):
        of_decoder(fields, model.state_dict(), context=33)


@pytest.mark.parametrize("fields, message", [
    ({"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model', expected 'clip_vis"),
    ({"num_channels": 1}, "num_channels is 1, expected 3"),
    ({"image_size": 30}, "image_size is 30, expected a multiple of the patch_size 14"),
    ({"image_size": [28, 28]}, r"image_size is \[28, 28\], expected a positive integer"),
    ({"image_size": None}, "image_size is None, expected a positive integer"),
    ({"patch_size": 0}, "patch_size is 0, expected a positive integer"),
    ({"model_type": "clip", "vision_config": "big"}, "vision_config is 'big', expected an object"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh', expected 'quick_gelu' or"),
])  # fmt: skip
def test_refuses_other_towers(fields, message):
    model = clip()
    with pytest.raises(UserError, match=f"^vision config: {message}"):
        of_vision(model.config.to_dict() | fields, model.state_dict())


K, HEAD = "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"
FIRST, FOURTH = "model.layers.0.mlp.gate_proj.weight", "model.layers.3.mlp.down_proj.weight"
POSITION, BIAS = "embeddings.position_embedding.weight", "encoder.layers.1.mlp.fc2.bias"


@pytest.mark.parametrize("source, change, message", [
    ("llama", lambda s: {K: None}, rf"{K} is missing, expected of shape \(24, 48\)"),
    ("llama", lambda s: {K: s[K].to(torch.int8)}, f"{K} is of dtype torch.int8, expected floats"),
    ("llama", lambda s: {K: s[K].to(torch.float8_e4m3fn)}, f"{K} is of dtype torch.float8_e4m3fn, expected floats"),
    ("llama", lambda s: {K: s[K][0, 0]}, rf"{K} is of shape \(\), expected of shape \(24, 48\)"),
    ("llama", lambda s: {K: s[K][1:]}, rf"{K} is of shape \(23, 48\), expected of shape \(24, 48\)"),
    ("llama", lambda s: {FOURTH: s[K]}, f"{FOURTH} is unknown"),
    ("llama", lambda s: {HEAD: None}, f"{HEAD} is missing"),
    ("qwen3", lambda s: {HEAD: s[HEAD] + 1}, f"{HEAD} differs from the embedding"),
    ("mixtral", lambda s: {FIRST: s[K]}, f"{FIRST} is unknown"),
    ("clip", lambda s: {BIAS: None}, rf"{BIAS} is missing, expected of shape \(128,\)"),
    ("clip", lambda s: {POSITION: s[POSITION][1:]}, rf"{POSITION} is of shape \(4, 128\)"),
    ("clip", lambda s: {"head.bias": s[BIAS]}, "head.bias is unknown"),
])  # fmt: skip
def test_refuses_tensors_that_are_missing_left_over_or_mis_shaped(source, change, message):
    model, load, part = (clip(), of_vision, "vision") if source == "clip" else (decoder(source), of_decoder, "decoder")
    state = model.state_dict()
    state = {name: value for name, value in (state | change(state)).items() if value is not None}
    with pytest.raises(UserError, match=f"^{part}: tensor {message}") as caught:
        load(model.config, state)
    assert "\n" not in str(caught.value)


def test_needs_no_transformers_to_import():
    code = "import sys, mm1.engine.convert.weights; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
