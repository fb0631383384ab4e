"""transformers' vision models compute and train the same with our embeddings as with theirs."""

import copy
import functools
import importlib
import inspect
import pickle
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, assert_exports, gradients, relative_error
from torch.distributed.fsdp import fully_shard

from mm1.integrations import embeddings
from mm1.integrations.transformers import accelerate, restore

transformers = pytest.importorskip("transformers")
vision_utils = pytest.importorskip("transformers.vision_utils")
siglip2 = importlib.import_module("transformers.models.siglip2.modeling_siglip2")

SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "num_patches": 25,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 16, "embed_dim": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 32, "num_position_embeddings": 25, "deepstack_visual_indexes": [0], "temporal_patch_size": 2,
    "fullatt_block_indexes": [1], "window_size": 16,
}  # fmt: skip
SHAPES = [(4, 5), (1, 1), (2, 9), (9, 3), (5, 5), (1, 7)]  # of a 5 x 5 table: kept, stretched and shrunk
THW = [(1, 4, 6), (3, 2, 2), (1, 2, 10), (2, 12, 4)]


def randomized(module):
    """Far from initial values: biases are not zero, norms are not ones."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.3 if p.ndim < 3 else 0.1)
    return module.eval().to(DEVICE)


@pytest.fixture
def ours(monkeypatch):
    """How many rows and columns each of our products had, and "positions" for each of them alone."""
    calls, fused, alone, linear = [], embeddings.embed_patches, embeddings.positions, embeddings.F.linear

    def counted(patches, *args, **options):
        calls.append(tuple(patches.shape))
        return fused(patches, *args, **options)

    def counted_alone(*args, **options):
        calls.append("positions")
        return alone(*args, **options)

    def counted_linear(x, *args):
        calls.append(tuple(x.shape))
        return linear(x, *args)

    monkeypatch.setattr(embeddings, "embed_patches", counted)
    monkeypatch.setattr(embeddings, "positions", counted_alone)
    monkeypatch.setattr(embeddings, "F", SimpleNamespace(linear=counted_linear))
    return calls


def step(model, call):
    """What `call` gives, and every parameter's gradient."""
    model.zero_grad()
    y = call()
    (y if y.ndim == 0 else y.float().square().sum()).backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(found, expected):
    (y, grads), (truth, true_grads) = found, expected
    assert y.dtype == truth.dtype
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5 * max(1.0, truth.abs().max().item()))
    assert grads.keys() == true_grads.keys()
    for key, grad in true_grads.items():
        assert relative_error(grads[key], grad) < 1e-4 or max(grads[key].abs().max(), grad.abs().max()) < 1e-5, key


# --- SigLIP 2


def naflex(shapes=SHAPES, rows=30, dtype=torch.float32):
    """Patches [B, rows, 48] and shapes [B, 2]; padded rows are not zero."""
    x = torch.randn(len(shapes), rows, 48, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype), torch.tensor(shapes, device=DEVICE)


def siglip_embeddings():
    return randomized(siglip2.Siglip2VisionEmbeddings(transformers.Siglip2VisionConfig(**SIGLIP)))


@pytest.mark.parametrize(
    "shapes, rows", [(SHAPES, 27), (SHAPES, 40), ([(3, 4)], 12), ([(1, 1)], 1), ([(16, 2)] * 3, 32)]
)
def test_siglip_embeddings_of_all_rows(shapes, rows, ours):
    module, (x, spatial) = siglip_embeddings(), naflex(shapes, rows)
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    truth = module(x, spatial)
    expected = gradients(truth, inputs)
    assert accelerate(module) == [""]
    y = module(x, spatial)
    assert ours == [(len(shapes) * rows, 48), "positions"]
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(y, inputs), expected):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("linear, table, pixels, autocast", [
    (torch.bfloat16, torch.bfloat16, torch.float32, False), (torch.float16, torch.float16, torch.float16, False),
    (torch.float32, torch.float32, torch.bfloat16, False), (torch.float32, torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.float32, torch.float32, False), (torch.float32, torch.float32, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, True), (torch.float64, torch.float64, torch.float32, False),
])  # fmt: skip
def test_siglip_dtypes(linear, table, pixels, autocast):
    module, (x, spatial) = siglip_embeddings(), naflex()
    truth = module(x, spatial)
    module.patch_embedding.to(linear)
    module.position_embedding.to(table)
    results = []
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = module(x.to(pixels), spatial)
        results.append([y, *gradients(y, list(module.parameters()))])
        accelerate(module)
    for found, expected in zip(*results[::-1]):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < 0.01
    assert relative_error(results[1][0], truth) <= 1.2 * relative_error(results[0][0], truth)


def test_siglip_models_train(ours):
    x, spatial = naflex()
    mask = torch.arange(30, device=DEVICE) < spatial.prod(1)[:, None]
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 16}  # fmt: skip
    config = transformers.Siglip2Config(text_config=text, vision_config=SIGLIP)
    model = randomized(transformers.Siglip2Model(config))
    ids = torch.randint(0, 40, (len(x), 8), device=DEVICE)

    def loss():
        out = model(input_ids=ids, pixel_values=x, pixel_attention_mask=mask, spatial_shapes=spatial, return_loss=True)
        return out.loss

    expected = step(model, loss)
    assert accelerate(model) == ["vision_model.embeddings"]
    assert not ours
    assert_same_steps(step(model, loss), expected)
    assert len(ours) == 2


def test_siglip_layers_that_are_no_longer_plain(ours):
    module, (x, spatial) = siglip_embeddings(), naflex()
    expected = step(module, lambda: module(x, spatial))
    accelerate(module)
    seen = []
    handle = module.patch_embedding.register_forward_hook(lambda *args: seen.append(1))
    assert_same_steps(step(module, lambda: module(x, spatial)), expected)
    assert seen == [1]
    assert ours == ["positions"] * 2, "the layer as it is, our positions"
    handle.remove()

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.patch_embedding.__class__ = Adapted
    found = module(x, spatial)
    restore(module)
    torch.testing.assert_close(found, module(x, spatial), rtol=1e-5, atol=1e-5)
    accelerate(module)
    module.position_embedding.__class__ = type("Embedding", (torch.nn.Embedding,), {})
    ours.clear()
    module(x, spatial)
    assert not ours


def test_siglip_compiles_whole_without_asking_for_sizes():
    module, given = siglip_embeddings(), naflex()
    accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shapes in (SHAPES, SHAPES[::-1], [(3, 3)] * 6):
        spatial = torch.tensor(shapes, device=DEVICE)
        found, expected = (step(module, lambda: call(given[0], spatial)) for call in (compiled, module))  # noqa: B023
        assert_same_steps(found, expected)


@pytest.mark.parametrize("shape", [(4, 7), (28, 1), (0, 3), (3, -1)])
def test_siglip_refuses_the_shapes_that_the_original_refuses(shape):
    module, (x, spatial) = siglip_embeddings(), naflex([(4, 5), (3, 9)], 27)
    accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, spatial), module(x, spatial))
    spatial = spatial.cpu()
    spatial[1] = torch.tensor(shape)
    with pytest.raises(
        ValueError, match=rf"spatial_shapes has \({shape[0]}, {shape[1]}\), expected .* most 27 patches"
    ):
        module(x, spatial)
    with pytest.raises(RuntimeError, match="spatial_shapes has no patches, or more than pixel_values has rows"):
        compiled(x.cpu(), spatial)
    restore(module)
    with pytest.raises(ValueError, match="positional embeddings"):
        module(x, spatial)


@pytest.mark.parametrize("strict", [True, False])
def test_siglip_exports_for_any_batch(strict):
    """The original's batch cannot be of any size."""
    module = siglip_embeddings()
    accelerate(module)
    batch, rows = torch.export.Dim("B", min=1, max=64), torch.export.Dim("N", min=1, max=256)
    cases = [naflex(), naflex([(3, 3), (2, 2)], 9), naflex([(1, 1)], 1), naflex([(4, 5)] * 5, 20)]
    assert_exports(lambda m, *t: m(*t), ({0: batch, 1: rows}, {0: batch}), *cases, strict=strict, parameters=[module])


# --- Qwen-VL


def patches_of(thw=THW, k=96, dtype=torch.float32):
    x = torch.randn(sum(t * h * w for t, h, w in thw), k, generator=torch.Generator().manual_seed(2))
    return x.to(DEVICE, dtype), torch.tensor(thw, device=DEVICE)


def class_of(key):
    model, name = key.split(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def keys_of(ours):
    return [key for key, value in embeddings.SWAPS.items() if value is ours]


def patch_embed(key):
    """Of a config, or of fields of one."""
    kind, fields = class_of(key), QWEN | {"in_channels": 3, "num_channels": 3}
    parameters = list(inspect.signature(kind).parameters)
    if parameters == ["config"]:
        return randomized(kind(SimpleNamespace(**fields)))
    return randomized(kind(**{name: fields[name] for name in parameters if name in fields}))


@pytest.mark.parametrize("key", keys_of(embeddings.PatchEmbed))
def test_every_patch_embedding(key, ours):
    module, (x, _) = patch_embed(key), patches_of()
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    results = []
    for given in (x, x.view(-1, 48), x.view(-1)):  # rows as they come; only their values count
        y = module(given)
        results.append([y, *gradients(y, inputs)])
    assert accelerate(module) == [""]
    for given, expected in zip((x, x.view(-1, 48), x.view(-1)), results):
        y = module(given)
        for a, b in zip([y, *gradients(y, inputs)], expected):
            assert relative_error(a, b) < 1e-5
    assert ours == [(len(x), 96)] * 3


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True), (torch.float64, False)])
def test_patch_embedding_dtypes(dtype, autocast):
    module, (x, _) = patch_embed("qwen2_vl.PatchEmbed").to(dtype), patches_of()
    results = []
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            results.append(module(x))
        accelerate(module)
    assert results[0].dtype == results[1].dtype
    assert relative_error(*results) < (1e-9 if dtype == torch.float64 else 0.01)


def source_classes():
    """Classes of transformers: "model.Class" -> source."""
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        parts = re.split(r"^class (\w+)\b", path.read_text(encoding="utf-8"), flags=re.M)
        for name, body in zip(parts[1::2], parts[2::2]):
            yield f"{path.parent.name}.{name}", re.split(r"^(?=[@\w])", body, maxsplit=1, flags=re.M)[0]


def test_classes_are_those_that_share_the_code():
    sources = dict(source_classes())

    def same(key, ours, begin, end=r"\Z"):
        """Keys of all classes in which that part of this class's source occurs."""
        part = re.search(rf"{begin}.*?(?={end})", sources[key], re.S).group().strip()
        assert {other for other, source in sources.items() if part in source} == set(keys_of(ours))

    same("qwen2_vl.PatchEmbed", embeddings.PatchEmbed, r"    def forward\(")
    same("siglip2.Siglip2VisionEmbeddings", embeddings.Siglip2Embeddings, r"    def forward\(")
    same(
        "qwen3_vl.Qwen3VLVisionModel",
        embeddings.Tower,
        r"        interp_indices, interp_weights = get_vision",
        "        position_embeddings =",
    )
    for key in keys_of(embeddings.PatchEmbed):
        assert "kernel_size=kernel_size, stride=kernel_size" in sources[key]


def tower(key="qwen3_vl.Qwen3VLVisionModel", **changes):
    kind = class_of(key)
    config = kind.config_class(**QWEN | changes)
    config._attn_implementation = "eager"
    return randomized(kind(config))


def outputs(model, x, thw, **kwargs):
    out = model(x, thw, **kwargs)
    parts = [out.last_hidden_state, out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    return torch.cat([part.flatten() for part in parts])


TOWERS = [*keys_of(embeddings.Tower), "qwen2_vl.Qwen2VisionTransformerPretrainedModel",
          "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel"]  # fmt: skip


@pytest.mark.parametrize("key", TOWERS)
def test_every_tower_trains(key, ours):
    model, (x, thw) = tower(key), patches_of()
    expected = step(model, lambda: outputs(model, x, thw))
    assert "pos_embed.weight" in expected[1] or "qwen2" in key
    assert accelerate(model) == (["patch_embed"] if "qwen2" in key else ["", "patch_embed"])
    assert_same_steps(step(model, lambda: outputs(model, x, thw)), expected)
    assert ours == [(len(x), 96)]


def placed(model, x, thw, **kwargs):
    """What goes into the first block."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, thw, **kwargs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("thw", [THW, [(1, 1, 1), (1, 1, 9), (2, 9, 1)], [(1, 48, 7)], [(2, 5, 5)]])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align", [True, False])
def test_positions_are_those_of_vision_utils(thw, mode, align, ours):
    merge = 2 if thw is THW else 1
    model, (x, grid) = tower(spatial_merge_size=merge), patches_of(thw)
    model.interpolation_mode, model.interpolation_align_corners = mode, align
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(grid, 5, mode, align, merge)
    truth = model.patch_embed(x) + (model.pos_embed(indices) * weights[..., None]).sum(1)
    accelerate(model)
    torch.testing.assert_close(placed(model, x, grid), truth, rtol=1e-5, atol=1e-5)
    assert len(ours) == 1


def test_precomputed_arguments_are_used(ours):
    model, (x, thw) = tower(), patches_of()
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(thw, 5)  # not what it would compute
    joined = torch.tensor([0, len(x)], dtype=torch.int32, device=DEVICE)
    turned = torch.zeros(len(x), 2, dtype=torch.long, device=DEVICE)
    cases = [
        {"interp_indices": indices, "interp_weights": weights}, {"interp_indices": indices}, {"cu_seqlens": joined},
        {"position_ids": turned},
    ]  # fmt: skip
    plain = outputs(model, x, thw)
    expected = [outputs(model, x, thw, **kwargs) for kwargs in cases]
    accelerate(model)
    for kwargs, truth in zip(cases, expected):
        torch.testing.assert_close(outputs(model, x, thw, **kwargs), truth, rtol=1e-5, atol=1e-5)
        assert torch.equal(truth, plain) == (kwargs is cases[1]), "or it shows nothing"
    assert len(ours) == 4


@pytest.mark.parametrize("part", ["pos_embed", "patch_embed", "patch_embed.proj"])
def test_towers_with_hooks_call_them(part, ours):
    model, (x, thw) = tower(), patches_of()
    seen = []
    model.get_submodule(part).register_forward_hook(lambda module, args, y: seen.append(args[0].shape) or y * 2)
    expected = step(model, lambda: outputs(model, x, thw))
    accelerate(model)
    assert_same_steps(step(model, lambda: outputs(model, x, thw)), expected)
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True), (torch.float64, False)])
def test_tower_dtypes(dtype, autocast, ours):
    model, (x, thw) = tower(), patches_of()
    truth = placed(model, x, thw)
    model.to(dtype)
    results = []
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            results.append(placed(model, x, thw))
        accelerate(model)
    assert results[0].dtype == results[1].dtype
    assert relative_error(*results) < 0.01
    assert relative_error(results[1], truth) <= 1.1 * relative_error(results[0], truth)
    assert len(ours) == 1


# --- still images


def stills():
    """Patches [P, (3, 2, 4, 4)] of still images, whose two frames are the same."""
    x, thw = patches_of([(1, 4, 6), (1, 2, 2)])
    return x.view(-1, 3, 1, 2, 16)[..., :1, :].expand(-1, 3, 2, 2, 16)[:, :, :, 0].flatten(1), thw


@pytest.mark.parametrize("key", [TOWERS[0], TOWERS[-1]])
def test_still_images_take_half_the_product(key, ours):
    model, (x, thw) = tower(key), stills()
    expected = step(model, lambda: outputs(model, x, thw))
    assert accelerate(model, still_images=True)[-1] == "patch_embed"
    assert_same_steps(step(model, lambda: outputs(model, x, thw)), expected)
    assert ours == [(28, 48)]
    accelerate(model)
    assert_same_steps(step(model, lambda: outputs(model, x, thw)), expected)
    assert ours[1:] == [(28, 96)], "it was a promise for as long as it stands"


def test_pixels_get_their_own_gradients_of_still_images():
    module, (x, _) = patch_embed("qwen2_vl.PatchEmbed"), stills()
    x = x.clone().requires_grad_()
    expected = gradients(module(x), [x])[0]
    accelerate(module, still_images=True)
    assert relative_error(gradients(module(x), [x])[0], expected) < 1e-5


# --- whole models


def conditional_generation():
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=QWEN, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return randomized(transformers.Qwen3VLForConditionalGeneration(config))


def prompt():
    images, image_thw = patches_of([(1, 4, 6), (1, 2, 2)])
    video, video_thw = patches_of([(2, 4, 2)])
    ids = [1, 62, *[60] * 6, 63, 2, 62, 60, 63, 3, *[62, *[61] * 2, 63] * 2, 5]
    kinds = [{60: 1, 61: 2}.get(i, 0) for i in ids]
    given = {"input_ids": [ids], "mm_token_type_ids": [kinds]}
    given = {key: torch.tensor(value, device=DEVICE) for key, value in given.items()}
    return given | {"pixel_values": images, "image_grid_thw": image_thw, "pixel_values_videos": video,
                    "video_grid_thw": video_thw}  # fmt: skip


def test_qwen3_vl_trains_and_generates(ours):
    model, given = conditional_generation(), prompt()
    expected = step(model, lambda: model(**given, labels=given["input_ids"]).loss)
    tokens = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert accelerate(model) == ["model.visual", "model.visual.patch_embed"]
    assert_same_steps(step(model, lambda: model(**given, labels=given["input_ids"]).loss), expected)
    assert ours == [(28, 96), (16, 96)]
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), tokens)


def test_output_recorders_and_checkpointing_still_work():
    model, (x, thw) = tower(), patches_of()
    expected = model(x, thw, output_hidden_states=True, output_attentions=True)
    accelerate(model)
    found = model(x, thw, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) >= 2
        for a, b in zip(found[name], expected[name]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    truth = step(model, lambda: outputs(model, x, thw))
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_steps(step(model, lambda: outputs(model, x, thw)), truth)


def snapshot(model):
    """All there is about each module but the values of its parameters."""

    def own(module):
        return {key: value for key, value in vars(module).items() if not key.startswith("_")}

    return [(name, type(m), own(m), list(vars(m)), list(m._parameters)) for name, m in model.named_modules()]


def test_swapping_leaves_everything_else_and_restore_no_trace(ours):
    model, given = tower(), patches_of()
    before, keys, parameters = snapshot(model), list(model.state_dict()), list(model.parameters())
    truth = outputs(model, *given)
    names = accelerate(model)
    state = snapshot(model)
    assert accelerate(model) == names, "twice is once"
    assert snapshot(model) == state
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for _, kind, *_ in before]
    assert all(isinstance(m, kind) for m, (_, kind, *_) in zip(model.modules(), before))
    assert str(model) == str(other := copy.deepcopy(model))
    assert restore(model) == names
    assert snapshot(model) == before
    assert restore(model) == []
    calls = len(ours)
    assert torch.equal(outputs(model, *given), truth)
    assert len(ours) == calls
    assert accelerate(model) == names
    assert restore(other) == names


def test_copies_pickles_and_checkpoints(tmp_path, ours):
    model, given = tower(), patches_of()
    truth = outputs(model, *given)
    accelerate(model, still_images=False)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model, tmp_path / "whole")
    found = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "whole", weights_only=False)
    ]  # fmt: skip
    for other in found:
        assert type(other) is type(model)
        assert type(other.patch_embed) is type(model.patch_embed)
        torch.testing.assert_close(outputs(other, *given), truth, rtol=1e-5, atol=1e-5)
    assert ours == [(len(given[0]), 96)] * 3
    assert model.config.architectures == ["Qwen3VLVisionModel"]
    loaded = type(model).from_pretrained(tmp_path / "saved").to(DEVICE)
    torch.testing.assert_close(outputs(loaded, *given), truth, rtol=1e-5, atol=1e-5)
    fresh = tower()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, *given), truth)
    model.load_state_dict(fresh.state_dict())


def test_a_patch_embedding_compiles_whole():
    module, (x, _) = patch_embed("qwen2_5_vl.Qwen2_5_VisionPatchEmbed"), patches_of()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    truth = compiled(x)
    for still in (False, True):
        accelerate(module, still_images=still)
        found, expected = (step(module, lambda: call(x)) for call in (compiled, module))  # noqa: B023
        assert_same_steps(found, expected)
        assert torch.allclose(found[0], truth, atol=1e-5) != still, "compiled code follows the swap"


@pytest.mark.parametrize("strict", [True, False])
def test_a_patch_embedding_exports_for_any_number_of_patches(strict):
    module = patch_embed("qwen2_5_vl.Qwen2_5_VisionPatchEmbed")
    accelerate(module)
    rows = {0: torch.export.Dim("P", min=1, max=4096)}
    cases = [(torch.randn(count, 96, device=DEVICE),) for count in (24, 1, 96)]
    assert_exports(lambda m, x: m(x), (rows,), *cases, strict=strict, parameters=[module])


def test_a_tower_compiles_whole_where_it_did():
    """All that depends on the sizes' values is computed before."""
    model, (x, thw) = tower(depth=1), patches_of()
    interpolation = vision_utils.get_vision_interpolation_indices_and_weights(thw, 5, "bilinear", True, 2)
    given = dict(zip(("interp_indices", "interp_weights"), interpolation)) | {
        "position_ids": vision_utils.get_vision_position_ids(thw, 2), "max_seqlen": 48,
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw),
    }  # fmt: skip
    truth = outputs(model, x, thw)
    accelerate(model)
    compiled = torch.compile(lambda x, thw: outputs(model, x, thw, **given), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, thw), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


def test_a_tower_compiles_in_parts_otherwise():
    model, (x, thw) = tower(depth=0, deepstack_visual_indexes=[]), patches_of()
    truth = outputs(model, x, thw)
    accelerate(model)
    found = outputs(torch.compile(model, backend="eager"), x, thw)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


def test_nothing_to_swap():
    class Siglip2VisionEmbeddings(siglip2.Siglip2VisionEmbeddings):
        """Another's, whose forward may be another."""

    module = Siglip2VisionEmbeddings(transformers.Siglip2VisionConfig(**SIGLIP))
    assert accelerate(module) == accelerate(torch.nn.Linear(2, 2)) == restore(torch.nn.Linear(2, 2)) == []
    module = siglip_embeddings()
    module.forward = lambda *args: 7
    assert accelerate(module) == []
    assert module(*naflex()) == 7
    model = tower()
    del model.interpolation_align_corners  # as in an older transformers
    assert accelerate(model) == ["patch_embed"]


def hooked(module, old):
    """As the library accelerate hooks its own forward in."""
    module._old_forward = old
    return functools.update_wrapper(functools.partial(lambda self, *a, **k: self._old_forward(*a, **k), module), old)


WRAPPERS = {
    "hook": hooked,
    "partial": lambda module, old: functools.partial(old),
    "closure": lambda module, old: lambda *args, **kwargs: old(*args, **kwargs),
    "bound method": lambda module, old: types.MethodType(lambda self, *args, **kwargs: old(*args, **kwargs), module),
    "function of the class": lambda module, old: functools.partial(type(module).forward, module),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("kind", ["siglip", "patches", "tower"])
def test_restored_after_somebody_wrapped_forward(kind, wrap, ours):
    module = {"siglip": siglip_embeddings, "patches": lambda: patch_embed("qwen2_vl.PatchEmbed"), "tower": tower}[
        kind
    ]()
    given = {"siglip": naflex, "patches": patches_of, "tower": patches_of}[kind]()[: 1 + (kind != "patches")]

    def call():
        y = module(*given)
        return y if isinstance(y, torch.Tensor) else y.pooler_output

    truth = call()
    names = accelerate(module)
    swapped = [module.get_submodule(name) for name in names]
    for each in swapped:
        each.forward = WRAPPERS[wrap](each, each.forward)
    torch.testing.assert_close(call(), truth, rtol=1e-4, atol=1e-4)
    count = len(ours)
    assert count
    assert accelerate(module) == names, "they are swapped still"
    assert restore(module) == names
    assert torch.equal(call(), truth)
    assert accelerate(module) == [], "what somebody replaced is left alone"
    for each in swapped:  # the wrapper goes, and puts back what it found
        each.forward = getattr(each, "_old_forward", each.forward)
    assert torch.equal(call(), truth)
    assert len(ours) == count
    for each in swapped:
        del each.forward
    assert accelerate(module) == names
    torch.testing.assert_close(call(), truth, rtol=1e-4, atol=1e-4)
    assert len(ours) > count


@pytest.fixture
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh(DEVICE, (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerated", "sharded"])
def test_sharded_modules(first, mesh, ours):
    module, given = siglip_embeddings(), naflex()
    truth = module(*given)
    steps = [lambda: fully_shard(module, mesh=mesh), lambda: accelerate(module) == [""] or pytest.fail("not swapped")]
    for each in steps[:: -1 if first == "accelerated" else 1]:
        each()
    assert type(module).__name__ == "FSDPSiglip2VisionEmbeddings"
    y = module(*given)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert ours == [(len(SHAPES) * 30, 48), "positions"]
    with pytest.raises(TypeError, match="config"):  # FSDP's own way with copies
        copy.copy(module)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(module)
    assert accelerate(module) == restore(module) == [""]
    assert type(module).__name__ == "FSDPSiglip2VisionEmbeddings"
    assert type(module).__mro__[2] is siglip2.Siglip2VisionEmbeddings
    module.reshard()
    assert torch.equal(module(*given), truth)
    assert len(ours) == 2


def test_a_module_in_two_places_is_swapped_once():
    module, (x, _) = patch_embed("qwen2_vl.PatchEmbed"), patches_of()
    truth = module(x)
    model = torch.nn.ModuleDict({"a": module, "b": module})
    assert accelerate(model) == ["a"]
    torch.testing.assert_close(model["b"](x), truth)
    restore(model)
    assert type(model["b"]) is class_of("qwen2_vl.PatchEmbed")


def test_names_the_package_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers>=5"$'):
        accelerate(torch.nn.Linear(1, 1))
