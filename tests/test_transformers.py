"""transformers' own mixture-of-experts models compute the same with our experts as with theirs."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_exports, relative_error

from mm1.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
integration.register()

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
LATENT = {  # the attention of DeepSeek
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Mixtral, gelu": {"num_local_experts": 4, "hidden_act": "gelu_pytorch_tanh"},
    "Qwen3Moe": {"num_experts": 8, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8},
    "DeepseekV3": LATENT | GROUPS | {"first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "swiglu_limit": 0.7, "sliding_window": 8, "rope_parameters": ROPE},
    "NemotronH": {  # without gates
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 24, "mlp_hidden_act": "relu2",
    },
    "DeepseekV4": {
        "n_routed_experts": 4, "swiglu_limit": 0.7, "sliding_window": 8, "mlp_layer_types": ["hash_moe", "moe"],
        "o_lora_rank": 16, "q_lora_rank": 16,
    },
}  # fmt: skip
IDS = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def randomized(module):
    """Far from initial values: norms are not ones, biases are not zero, routers are not flat."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3 if p.ndim < 2 else 1.5 * p.shape[-1] ** -0.5)
    return module.float().eval().to(DEVICE)


def model_of(name, **options):
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS[name])
    model = randomized(transformers.AutoModelForCausalLM.from_config(config, **options))
    for key, table in model.named_buffers():
        if key.endswith("tid2eid"):  # experts of DeepSeek-V4's hash routing, all 0 before weights are loaded
            table.copy_(torch.rand(len(table), config.n_routed_experts).argsort(1)[:, : table.shape[1]])
    return model


@pytest.fixture
def ours(monkeypatch):
    """How many tokens each call of moe_mlp had, newest last."""
    calls, real = [], integration.moe_mlp

    def counted(x, *args, **options):
        calls.append(len(x))
        return real(x, *args, **options)

    monkeypatch.setattr(integration, "moe_mlp", counted)
    return calls


@pytest.fixture
def unwarned():
    """Forget the warnings that this process has shown."""
    integration.WARNED.clear()


def step(model, implementation):
    """Logits, and every parameter's gradient."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return out.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_generated_tokens(name, ours):
    model = model_of(name)
    logits, grads = step(model, "eager")
    assert not ours
    found, found_grads = step(model, "mm1")
    layers = sum(hasattr(module, "has_gate") for module in model.modules())
    assert ours == [IDS.numel()] * layers
    assert layers
    assert relative_error(found, logits) < 1e-4
    assert found_grads.keys() == grads.keys()
    assert sum("experts" in key for key in grads) >= 2 * layers
    for key in grads:
        assert grads[key].any(), f"{key} has no gradient to compare"
        assert relative_error(found_grads[key], grads[key]) < 1e-4, key

    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    tokens = model.generate(IDS, **options)
    assert ours[-1] == len(IDS), "a cached step has one token a sequence"
    model.set_experts_implementation("eager")
    assert torch.equal(model.generate(IDS, **options), tokens)


def test_models_are_made_with_it_and_load_with_it(tmp_path, ours):
    model = model_of("Mixtral", experts_implementation="mm1")
    logits = model(IDS).logits
    assert len(ours) == 2
    model.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mm1").to(DEVICE)
    assert torch.equal(model(IDS).logits, logits)
    assert len(ours) == 4


def decorated():
    """Every class of transformers that asks the interface: name -> module."""
    root = Path(transformers.__file__).parent / "models"
    pattern = r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)"
    return {
        name: f"transformers.models.{path.parent.name}.{path.stem}"
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.M)
    }


CLASSES = decorated()
HANDED_BACK = {"Inkling2Experts", "MuseSparkExperts"}
E, D, TOKENS, K = 5, 32, 19, 3


def experts(name, **fields):
    """One of CLASSES at random; the fields are those of any of their configs."""
    count = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E)
    width = {"intermediate_size": 24, "moe_intermediate_size": 24, "moe_hidden_size": D, "moe_latent_size": None}
    acts = {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2"}
    gates = {"swiglu_limit": 0.7, "swiglu_alpha": 1.702, "mlp_gate_softcap": 1.5, "mlp_up_softcap": 1.5}
    config = {"hidden_size": D, "post_norm_eps": 1e-6, "_experts_implementation": "mm1"} | count | width | acts | gates
    kind = getattr(importlib.import_module(CLASSES[name]), name) if isinstance(name, str) else name
    return randomized(kind(SimpleNamespace(**config | fields)))


def routed():
    """x, top_k_index and top_k_weights of TOKENS tokens, each to K different experts."""
    index = torch.rand(TOKENS, E).argsort(1)[:, :K]
    return torch.randn(TOKENS, D, device=DEVICE), index.to(DEVICE), torch.rand(TOKENS, K, device=DEVICE)


def run(module, implementation, x, index, weight):
    """y, and gradients of x, weight and all parameters."""
    module.config._experts_implementation = implementation
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = module(x, index, weight)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, weight, *module.parameters()])]


@pytest.mark.parametrize("name", CLASSES)
def test_every_experts_class_of_transformers(name, ours, unwarned):
    module, given = experts(name), routed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for found, expected in zip(run(module, "mm1", *given), run(module, "eager", *given)):
            largest = max(1.0, expected.abs().max().item())  # gradients of squared ReLUs are in the thousands
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * largest)
            assert relative_error(found, expected) < 1e-4
        assert len(ours) == (name not in HANDED_BACK)
        assert sum(name in str(warning.message) for warning in caught) == (name in HANDED_BACK)
        for dtype in (torch.bfloat16, torch.float16):
            x, index, weight = (t.to(dtype) if t.is_floating_point() else t for t in given)
            module.to(dtype)
            truth = run(module, "eager", x, index, weight)[0]
            assert relative_error(run(module, "mm1", x, index, weight)[0], truth) < 0.02


ACTIVATIONS = {act: transformers.activations.ACT2FN[act] for act in (
    "silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast",
    "gelu_accurate", "quick_gelu", "relu", "relu2",
)} | {"GELU": torch.nn.GELU(), "GELU, tanh": torch.nn.GELU("tanh"), "F.silu": F.silu, "F.gelu": F.gelu}  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", ["MixtralExperts", "NemotronHExperts"])
def test_activations(name, act, ours):
    module, given = experts(name), routed()
    del module.act_fn
    module.act_fn = ACTIVATIONS[act]
    for found, expected in zip(run(module, "mm1", *given), run(module, "eager", *given)):
        assert relative_error(found, expected) < 1e-4
    assert len(ours) == 1


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts"])
def test_slots_of_other_ranks_contribute_nothing(name, ours):
    module, (x, index, weight) = experts(name), routed()
    module._is_expert_parallel = True
    away = torch.rand(index.shape, device=DEVICE) < 0.4
    away[3], away[4] = True, False
    index, weight = index.masked_fill(away, E), weight.masked_fill(away, 0.0)
    found, expected = (run(module, implementation, x, index, weight) for implementation in ("mm1", "grouped_mm"))
    assert len(ours) == 1
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 1e-4
    assert not found[0][3].any()
    assert not found[2][away].any()


@moe.use_experts_implementation
class Unheard(torch.nn.Module):
    """A gate nobody has told us of."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = torch.nn.Parameter(torch.empty(E, 48, D))
        self.down_proj = torch.nn.Parameter(torch.empty(E, D, 24))

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return gate.sin() * up


class GptOssExperts(Unheard):
    """Another's of a name that we know."""


FALLBACKS = {
    "norm": ("MuseSparkExperts", {}, "post_expert_norm"),
    "unknown gate": (Unheard, {}, "_apply_gate"),
    "unknown gate, known name": (GptOssExperts, {}, "_apply_gate"),
    "other alpha": ("OpenAIPrivacyFilterExperts", {"swiglu_alpha": 1.5}, "alpha other than 1.702"),
    "other activation": ("MixtralExperts", {"hidden_act": "mish"}, "MishActivation"),
    "no gate, other activation": ("NemotronHExperts", {"mlp_hidden_act": "tanh"}, "Tanh"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_we_do_not_compute_goes_back_with_one_warning(case, ours, unwarned):
    name, fields, feature = FALLBACKS[case]
    module, given = experts(name, **fields), routed()
    with pytest.warns(UserWarning, match=feature) as caught:
        found = [run(module, "mm1", *given) for _ in range(2)][1]
    assert len(caught) == 1
    assert type(module).__name__ in str(caught[0].message)
    assert not ours
    for a, b in zip(found, run(module, "grouped_mm", *given)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_differ(name, weight_dtype, ours):
    module, (x, index, weight) = experts(name), routed()
    truth = run(module, "eager", x, index, weight)
    module.bfloat16()
    found = run(module, "mm1", x, index, weight.to(weight_dtype))
    assert [t.dtype for t in found[:3]] == [torch.float32, torch.float32, weight_dtype]
    assert {t.dtype for t in found[3:]} == {torch.bfloat16}
    for a, b in zip(found, truth):
        assert relative_error(a, b) < 0.03
    assert len(ours) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, ours):
    module, (x, index, weight) = experts("MixtralExperts"), routed()
    truth = run(module, "eager", x, index, weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(module, "mm1", x.to(dtype), index, weight)
    assert [t.dtype for t in found] == [dtype, dtype] + [torch.float32] * 3
    for a, b in zip(found, truth):
        assert 1e-5 < relative_error(a, b) < 0.03
    assert len(ours) == 1


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH", "DeepseekV3"])
def test_a_block_compiles_whole(name):
    model = model_of(name, experts_implementation="mm1")
    block = next(m for m in reversed(list(model.modules())) if any(hasattr(c, "has_gate") for c in m.children()))
    x = torch.randn(2, 7, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for call in (block, compiled):
        y = call(x)
        y = y[0] if isinstance(y, tuple) else y
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for found, expected in zip(*results[::-1]):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name, strict", [
    ("MixtralExperts", True), ("MixtralExperts", False), ("GptOssExperts", False), ("NemotronHExperts", False),
])  # fmt: skip
def test_experts_export_for_any_number_of_tokens(name, strict):
    rows = {0: torch.export.Dim("T", min=1, max=4096)}
    given = routed()
    cases = [tuple(t[:count] for t in given) for count in (7, TOKENS, 1)]
    assert_exports(lambda m, *t: m(*t), (rows,) * 3, *cases, strict=strict, parameters=[experts(name)])


def test_models_export_for_any_batch():
    model = model_of("Mixtral", experts_implementation="mm1")
    sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("L", min=2, max=64)}
    cases = [(IDS,), (IDS[:1, :2],), (IDS.repeat(3, 1)[:5, :7],), (IDS.repeat(6, 1)[:11],)]
    with torch.no_grad():
        assert_exports(lambda m, ids: m(ids, use_cache=False).logits, (sizes,), *cases, parameters=[model])


@pytest.mark.parametrize("name", ["Lfm2MoeExperts", "HYV4Experts", "MuseSparkExperts"])
def test_experts_compile_whole_and_warn_once(name, unwarned):
    module, given = experts(name), routed()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [compiled(*given), compiled(*(t[:7] for t in given))]
    assert sum(name in str(warning.message) for warning in caught) == (name in HANDED_BACK)
    assert relative_error(found[0], module(*given)) < 1e-5
    assert relative_error(found[1], found[0][:7]) < 1e-5


DEAF = {
    "Llama4Text": {"num_local_experts": 4, "intermediate_size_mlp": 24},
    "LongcatFlash": LATENT | {
        "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24, "n_routed_experts": 4, "zero_expert_num": 0, "moe_topk": 2,
        "num_layers": 1,
    },
    "Dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 61,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
}  # fmt: skip


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "mm1" in str(warning.message)]


@pytest.mark.parametrize("name", DEAF)
@pytest.mark.parametrize("when", ["made", "loaded", "set"])
def test_a_mixture_that_never_asks_the_interface_warns_once(name, when, tmp_path, ours, unwarned):
    fields = DEAF[name] if name == "Dbrx" else SIZES | DEAF[name]
    config = getattr(transformers, f"{name}Config")(**fields)
    make = transformers.AutoModelForCausalLM.from_config
    model = make(config)
    model.save_pretrained(tmp_path)
    asked = {
        "made": lambda: make(config, experts_implementation="mm1"),
        "loaded": lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mm1"),
        "set": lambda: model.set_experts_implementation("mm1"),
    }[when]
    found = warnings_of(asked)
    assert len(found) == 1
    assert config.model_type in found[0]
    assert "changes nothing" in found[0]
    model(IDS.cpu())
    assert not ours
    assert not warnings_of(asked), "it is said once"


def test_models_of_two_parts_warn_of_the_one_that_never_asks(unwarned):
    """Llama 4's is nested, and Mixtral nested in LLaVA asks."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = transformers.Llama4TextConfig(**SIZES | DEAF["Llama4Text"])
    pixels = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config=text, vision_config=vision | pixels)
    assert not warnings_of(lambda: transformers.Llama4ForConditionalGeneration(config))
    model = transformers.Llama4ForConditionalGeneration(config)
    assert len(warnings_of(lambda: model.set_experts_implementation("mm1"))) == 1
    config = transformers.LlavaConfig(
        text_config=transformers.MixtralConfig(**SIZES | MODELS["Mixtral"]),
        vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=60,
    )  # fmt: skip
    make = transformers.AutoModelForImageTextToText.from_config
    assert not warnings_of(lambda: make(config, experts_implementation="mm1"))
    assert not warnings_of(lambda: make(config).set_experts_implementation("mm1"))


@pytest.mark.parametrize("packed", ["gate_up_proj", "down_proj"])
def test_packed_weights_are_named(packed):
    module, given = experts("MixtralExperts"), routed()
    bytes_ = torch.zeros(getattr(module, packed).numel() // 2, 1, dtype=torch.uint8, device=DEVICE)
    setattr(module, packed, torch.nn.Parameter(bytes_, requires_grad=False))
    with pytest.raises(ValueError, match=f"moe_mlp: dtype of {packed[:-5]} is torch.uint8, expected "):
        module(*given)


@pytest.mark.parametrize("name", ["GptOssExperts", "MixtralExperts"])
def test_classes_derived_on_the_fly_are_known(name, ours, unwarned):
    """As of FSDP2, of parametrizations and so of adapters."""
    module, given = experts(name), routed()
    expected = run(module, "eager", *given)
    module.__class__ = type(f"FSDP{name}", (type(module),), {})
    for a, b in zip(run(module, "mm1", *given), expected):
        assert relative_error(a, b) < 1e-4
    truth = [module.gate_up_proj.detach(), module.down_proj.detach()]
    torch.nn.utils.parametrize.register_parametrization(module, "gate_up_proj", torch.nn.Tanh())
    found = run(module, "mm1", *given)[0]
    assert len(ours) == 2
    assert relative_error(found, run(module, "eager", *given)[0]) < 1e-4
    torch.nn.utils.parametrize.remove_parametrizations(module, "gate_up_proj", leave_parametrized=False)
    assert torch.equal(module.gate_up_proj, truth[0])


def test_registering_twice_is_registering_once():
    watched = transformers.PreTrainedModel.get_correct_experts_implementation
    integration.register()
    assert moe.ALL_EXPERTS_FUNCTIONS["mm1"] is integration.experts_forward
    assert transformers.PreTrainedModel.get_correct_experts_implementation is watched


def test_names_the_package_where_transformers_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import mm1.integrations.transformers as t; t.register()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "transformers>=5"' in result.stderr.splitlines()[-1]
