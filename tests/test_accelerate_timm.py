"""timm's NaFlexVit computes and trains the same with our embeddings as with its own."""

import copy
import itertools
import pickle
import sys

import pytest
import torch
from conftest import DEVICE, assert_exports, gradients, relative_error

from mm1.integrations import timm as integration
from mm1.integrations.timm import accelerate, restore

naflexvit = pytest.importorskip("timm.models.naflexvit")

GRIDS = [(4, 5), (1, 1), (2, 9), (9, 3), (3, 4), (1, 7)]  # of a 3 x 4 table: kept, stretched and shrunk
ROWS = 30


def randomized(module):
    """Far from initial values: biases are not zero, norms are not ones."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.3)
    return module.eval().to(DEVICE)


def embeds(**options):
    defaults = {"patch_size": 4, "embed_dim": 16, "pos_embed_grid_size": (3, 4), "proj_type": "linear"}
    return randomized(naflexvit.NaFlexEmbeds(**defaults | options))


def coordinates(grids=GRIDS, rows=ROWS):
    """Of patches (y, x) [B, rows, 2], raster by raster, and which are there; the others have zeros."""
    coord, valid = torch.zeros(len(grids), rows, 2, dtype=torch.long), torch.zeros(len(grids), rows, dtype=torch.bool)
    for i, (h, w) in enumerate(grids):
        places = torch.tensor(list(itertools.product(range(h), range(w))))[:rows]
        coord[i, : len(places)], valid[i, : len(places)] = places, True
    return coord.to(DEVICE), valid.to(DEVICE)


def naflex(grids=GRIDS, rows=ROWS):
    x = torch.randn(len(grids), rows, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x, coordinates(grids, rows)[0]


def images(height=24, width=20):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture
def ours(monkeypatch):
    """Rows of each of our products, and "positions" for each of them alone."""
    calls, fused, alone = [], integration.embed_patches, integration.positions

    def counted(patches, *args, **options):
        calls.append(len(patches))
        return fused(patches, *args, **options)

    def counted_alone(*args, **options):
        calls.append("positions")
        return alone(*args, **options)

    monkeypatch.setattr(integration, "embed_patches", counted)
    monkeypatch.setattr(integration, "positions", counted_alone)
    return calls


def compare(module, x, *rest, swapped=True):
    """Outputs, grids and gradients before and after."""
    x = x.requires_grad_(x.is_floating_point())
    inputs = [x, *module.parameters()]
    truth, size = module(x, *rest)
    expected = gradients(truth, inputs)
    assert accelerate(module) == [""] * swapped
    y, found_size = module(x, *rest)
    assert found_size == size
    assert y.dtype == truth.dtype
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(y, inputs), expected):
        assert relative_error(a, b) < 1e-5


INTERPOLATIONS = list(itertools.product(("bicubic", "bilinear"), (True, False), (True, False)))


@pytest.mark.parametrize("mode, antialias, align", INTERPOLATIONS)
def test_patches_of_all_rows(mode, antialias, align, ours):
    options = {"pos_embed_interp_mode": mode, "pos_embed_antialias": antialias, "pos_embed_align_corners": align}
    compare(embeds(**options), *naflex())
    assert ours == [len(GRIDS) * ROWS]


@pytest.mark.parametrize("mode, antialias, align", INTERPOLATIONS)
@pytest.mark.parametrize("proj_type", ["linear", "conv"])
def test_images(mode, antialias, align, proj_type, ours):
    options = {"pos_embed_interp_mode": mode, "pos_embed_antialias": antialias, "pos_embed_align_corners": align}
    compare(embeds(proj_type=proj_type, **options), images())
    assert ours == [2 * 30]


NORM = torch.nn.LayerNorm
OPTIONS = {
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 3},
    "no bias": {"proj_bias": False},
    "input norm": {"input_norm_layer": NORM},
    "channels first": {"channels_last": False},
    "oblong patches": {"patch_size": (2, 8)},
    "grid sampled, but not of images": {"pos_embed_use_grid_sample": True},
    "interpolator, not in use": {"enable_patch_interpolator": True},
    "table of one": {"pos_embed_grid_size": (1, 1)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, ours):
    compare(embeds(**OPTIONS[name]), images(24, 16))
    assert ours == [2 * 24] or name == "table of one"
    if "sampled" not in name:
        compare(embeds(**OPTIONS[name]), *naflex())
        assert len(ours) == 2


@pytest.mark.parametrize("proj_type", ["linear", "conv"])
@pytest.mark.parametrize("height, width", [(23, 18), (24, 20), (4, 4), (2, 9), (9, 2)])
def test_images_that_fill_no_whole_patches(proj_type, height, width, ours):
    compare(embeds(proj_type=proj_type, dynamic_img_pad=True), images(height, width))
    module, x = embeds(proj_type=proj_type), images(height, width)
    if min(height, width) >= 4 and (proj_type == "conv" or height % 4 == width % 4 == 0):
        compare(module, x)
        return
    with pytest.raises(RuntimeError) as expected:
        module(x)
    accelerate(module)
    with pytest.raises(RuntimeError) as found:
        module(x)
    assert str(found.value) == str(expected.value)


def test_dropped_patches_and_more_rows_than_the_grid_has(ours):
    """timm reads from the coordinates how large the grid is, and nothing else."""
    x, coord = naflex()
    order = torch.rand(ROWS).argsort()[:11].to(DEVICE)
    compare(embeds(), x[:, :11], coord[:, order])
    compare(embeds(), x[:, :4], coord[:, :1] + torch.tensor([6, 2], device=DEVICE))
    assert ours == [66, 24]


def test_coordinates_do_not_count_for_a_convolution(ours):
    compare(embeds(proj_type="conv"), images(), coordinates([(2, 2)] * 2, 30)[0])
    assert ours == [60]


def test_patches_with_their_sides(ours):
    x, coord = naflex()
    compare(embeds(), x.view(*x.shape[:2], 4, 4, 3), coord)
    assert ours == [len(x) * ROWS]


PARTLY = {
    "norm of the projection": ({"proj_norm_layer": NORM}, (4, 4)),
    "patches of another size": ({"enable_patch_interpolator": True}, (6, 5)),
}


@pytest.mark.parametrize("name", PARTLY)
def test_projections_of_timm_get_our_positions(name, ours):
    options, (ph, pw) = PARTLY[name]
    coord, _ = coordinates()
    compare(embeds(**options), torch.randn(len(coord), ROWS, ph, pw, 3, device=DEVICE), coord)
    assert ours == ["positions"]


LEFT = {
    "factorized": {"pos_embed": "factorized"},
    "none": {"pos_embed": "none"},
    "aspect preserved": {"pos_embed_ar_preserving": True},
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name, ours):
    compare(embeds(**LEFT[name]), *naflex(), swapped=False)
    compare(embeds(**LEFT[name]), images(), swapped=False)
    assert not ours


def test_left_to_timm_call_by_call(ours):
    compare(embeds(pos_embed_use_grid_sample=True), *naflex())
    compare(embeds(proj_norm_layer=NORM), images())
    module, given = embeds(), naflex()
    accelerate(module)
    module.pos_embed_ar_preserving = True
    found = module(*given)[0]
    restore(module)
    assert torch.equal(found, module(*given)[0])
    module.double()
    assert accelerate(module) == []
    assert not ours


def test_layers_that_are_no_longer_plain(ours):
    module, (x, coord) = embeds(), naflex()
    seen = []
    handle = module.proj.register_forward_hook(lambda layer, args, y: seen.append(1) or 2 * y)
    compare(module, x, coord)
    assert len(seen) == 2
    handle.remove()
    restore(module)
    module.norm.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    compare(module, x, coord)
    assert ours == ["positions"] * 2


@pytest.mark.parametrize("weight, table, autocast", [
    (torch.bfloat16, torch.bfloat16, False), (torch.float16, torch.float16, False),
    (torch.bfloat16, torch.float32, False), (torch.float32, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, True),
])  # fmt: skip
@pytest.mark.parametrize("given", ["patches", "images"])
def test_dtypes(weight, table, autocast, given, ours):
    module, given = embeds(reg_tokens=1), naflex() if given == "patches" else (images(),)
    truth, _ = module(*given)
    module.to(weight)
    module.pos_embed.data = module.pos_embed.data.to(table)
    results = []
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y, _ = module(given[0].to(weight), *given[1:])
        results.append([y, *gradients(y, list(module.parameters()))])
        accelerate(module)
    for found, expected in zip(*results[::-1]):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < 0.01
    assert relative_error(results[1][0], truth) <= 1.05 * relative_error(results[0][0], truth)
    assert len(ours) == 1


def model_of(**options):
    defaults = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": True, "reg_tokens": 1,
                "pos_embed_grid_size": (3, 4)}  # fmt: skip
    return randomized(naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**defaults | options), num_classes=7))


def step(model, *given):
    """Loss, and every parameter's gradient; dropouts draw the same each time."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = torch.nn.functional.cross_entropy(model(*given), torch.arange(len(given[0])).to(DEVICE) % 7)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["patches", "images", "convolution", "dropped", "rotary"])
def test_models_train(kind, ours):
    options = {
        "convolution": {"embed_proj_type": "conv"}, "rotary": {"rope_type": "axial"},
        "dropped": {"patch_drop_rate": 0.4, "pos_drop_rate": 0.3, "proj_drop_rate": 0.1, "global_pool": "avg"},
    }  # fmt: skip
    model = model_of(**options.get(kind, {})).train()
    x, coord = naflex()
    valid = coordinates()[1]
    given = (images(),) if kind in ("images", "convolution") else (x, coord, valid)
    loss, grads = step(model, *given)
    assert accelerate(model) == ["embeds"]
    found, found_grads = step(model, *given)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    assert found_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert relative_error(found_grads[key], grad) < 1e-4, key
    assert len(ours) == 1
    if kind == "patches":
        model.eval()
        given = {"patches": x, "patch_coord": coord, "patch_valid": valid}
        options = {"output_fmt": "NLC", "intermediates_only": True}
        found = [model(given), *model.forward_intermediates(given, **options)]
        restore(model)
        for a, b in zip(found, [model(given), *model.forward_intermediates(given, **options)]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["patches", "images", "convolution", "norm"])
def test_compiles_whole_without_asking_for_sizes(given):
    module = embeds(proj_type="conv" if given == "convolution" else "linear",
                    proj_norm_layer=NORM if given == "norm" else None)  # fmt: skip
    accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if given == "patches" else "eager")
    cases = [(images(),), (images(16, 28),)][: 1 + (given == "convolution")]
    if given in ("patches", "norm"):
        x, coord = naflex()
        cases = [(x, coord), (x, coord.flip(0))]
    for case in cases:
        inputs = list(module.parameters())
        (found, size), (expected, true_size) = compiled(*case), module(*case)
        assert size == true_size
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(found, inputs), gradients(expected, inputs)):
            assert relative_error(a, b) < 1e-5


BATCH, SIDE, OTHER = (torch.export.Dim(name, min=low, max=64) for name, low in (("B", 1), ("N", 1), ("M", 2)))


@pytest.mark.parametrize("kind, strict", [
    ("patches", True), ("patches", False), ("images", False), ("convolution", False), ("norm", False),
])  # fmt: skip
def test_embeddings_export_for_any_batch(kind, strict):
    """timm's own cannot be exported for patches, nor for images of any size."""
    module = embeds(reg_tokens=1, proj_type="conv" if kind == "convolution" else "linear",
                    proj_norm_layer=NORM if kind == "norm" else None)  # fmt: skip
    assert accelerate(module) == [""]
    if kind in ("patches", "norm"):
        shapes = ({0: BATCH, 1: SIDE},) * 2
        grids = [([(4, 5), (1, 1), (2, 9)], 20), ([(3, 3)] * 2, 9), (GRIDS, ROWS), ([(1, 1)], 1)]
        cases = [naflex(*each) for each in grids[: 4 - (kind == "norm")]]
    else:
        shapes = ({0: BATCH, 2: 4 * OTHER, 3: 4 * torch.export.Dim("L", min=2, max=64)},)
        cases = [(torch.randn(size, device=DEVICE),) for size in ((2, 3, 24, 20), (3, 3, 16, 28), (1, 3, 12, 12))]
    assert_exports(lambda m, *t: m(*t)[0], shapes, *cases, strict=strict, parameters=[module])


def test_models_export_for_any_batch():
    model = model_of(depth=1)
    assert accelerate(model) == ["embeds"]
    grids = [([(4, 5), (1, 1), (2, 9)], 20), ([(3, 3)] * 2, 9), ([(1, 1)], 1), (GRIDS, ROWS)]
    cases = [(naflex(*each)[0], *coordinates(*each)) for each in grids]
    assert_exports(lambda m, *t: m(*t), ({0: BATCH, 1: SIDE},) * 3, *cases, parameters=[model])


def snapshot(model):
    return [(name, type(m), list(vars(m)), list(m._parameters)) for name, m in model.named_modules()]


def test_swapping_leaves_everything_else_and_restore_no_trace(ours):
    model, given = model_of(), (*naflex(), coordinates()[1])
    before, keys, parameters = snapshot(model), list(model.state_dict()), list(model.parameters())
    truth = model(*given)
    assert accelerate(model) == accelerate(model) == ["embeds"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.embeds, naflexvit.NaFlexEmbeds)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.embeds) is type(model.embeds)
        torch.testing.assert_close(other(*given), truth, rtol=1e-5, atol=1e-5)
        assert restore(other) == ["embeds"]
    assert len(ours) == 2
    fresh = model_of()
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
    assert restore(model) == ["embeds"]
    assert snapshot(model) == before
    assert restore(model) == []
    assert torch.equal(model(*given), truth)
    assert len(ours) == 2


def twice(module):
    torch.nn.utils.parametrize.register_parametrization(module, "pos_embed", Twice())


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("first", ["accelerated", "parametrized"])
@pytest.mark.parametrize("last", ["restored", "plain"])
def test_parametrized_modules(first, last, ours):
    """Their class derives from the module's own, and goes with the last parametrization."""
    module, given = embeds(), naflex()
    plain, _ = module(*given)
    twice(reference := copy.deepcopy(module))
    truth, _ = reference(*given)
    steps = [lambda: twice(module), lambda: accelerate(module)]
    for each in steps[:: -1 if first == "accelerated" else 1]:
        each()
    for other in (module, copy.deepcopy(module)):
        torch.testing.assert_close(other(*given)[0], truth, rtol=1e-5, atol=1e-5)
    assert len(ours) == 2
    steps = [
        lambda: torch.nn.utils.parametrize.remove_parametrizations(module, "pos_embed", leave_parametrized=False),
        lambda: restore(module) == [""] or pytest.fail("not restored"),
    ]
    steps = steps[:: -1 if last == "plain" else 1]
    steps[0]()
    torch.testing.assert_close(module(*given)[0], truth if last == "plain" else plain, rtol=1e-5, atol=1e-5)
    assert len(ours) == 2 + (last == "restored")
    steps[1]()
    assert type(module) is naflexvit.NaFlexEmbeds
    assert torch.equal(module(*given)[0], plain)


def test_restored_after_somebody_wrapped_forward(ours):
    model, given = model_of(), (*naflex(), coordinates()[1])
    truth = model(*given)
    accelerate(model)
    old = model.embeds.forward
    model.embeds.forward = lambda *args, **kwargs: old(*args, **kwargs)
    torch.testing.assert_close(model(*given), truth, rtol=1e-5, atol=1e-5)
    assert restore(model) == ["embeds"]
    assert torch.equal(model(*given), truth)
    assert len(ours) == 1


def test_nothing_to_swap():
    class NaFlexEmbeds(naflexvit.NaFlexEmbeds):
        """Another's, whose forward may be another."""

    module = NaFlexEmbeds(patch_size=4, embed_dim=16)
    assert accelerate(module) == accelerate(torch.nn.Linear(2, 2)) == restore(torch.nn.Linear(2, 2)) == []
    module = embeds()
    module.forward = lambda *args: 7
    assert accelerate(module) == []
    assert module(*naflex()) == 7


def test_names_the_package_where_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "timm>=1.0.31"$'):
        accelerate(torch.nn.Linear(1, 1))
