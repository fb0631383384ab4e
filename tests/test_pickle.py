"""Models, and what works with them, are pickled, saved and copied: equal afterwards, and nothing of the original's."""

import copy
import dataclasses
import io
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import not_interpreted
from small import documents, logits_of, packed, small_mm1

from mm1.engine.data.batch import PackedMedia
from mm1.engine.infer.cache import Cache
from mm1.engine.infer.decode import Step
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate
from mm1.engine.infer.graphs import Graphs
from mm1.engine.infer.sampling import Sampling
from mm1.engine.layers import blocked as packing
from mm1.engine.layers import quantize
from mm1.engine.layers.blocked import BlockedLinear, Head
from mm1.engine.models.mm1 import MM1
from mm1.engine.train import checkpoint
from mm1.engine.train.prepare import compile_blocks
from mm1.engine.train.recompute import recompute_blocks
from mm1.kernels.patches.grids import Grids

pytestmark = not_interpreted
ROOT = Path(__file__).parent.parent


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy, "save": saved}
way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def other_connector() -> MM1:
    c = small_mm1().config
    connector, vision = (
        dataclasses.replace(c.connector, kind="attention"),
        dataclasses.replace(c.vision, class_token=True),
    )
    return MM1(dataclasses.replace(c, connector=connector, vision=vision)).init_weights()


def loaded() -> MM1:
    """As mm1.load gives it, parameters assigned from a file."""
    model = small_mm1()
    texts = {"config.json": json.dumps({"model": dataclasses.asdict(model.config)})}
    texts["tokenizer.json"] = Path(model.tokenizer.path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(Path(folder) / "one", {"model.safetensors": model.state_dict()}, texts)
        return checkpoint.load(Path(folder) / "one")


def generated() -> MM1:
    model = small_mm1().eval()
    generate(model, [["a"], ["b c"]], max_tokens=3)
    return model


def compiled() -> MM1:
    model = small_mm1()
    compile_blocks(model, backend="eager")
    logits_of(model, packed(documents()))
    return model


def recomputing() -> MM1:
    model = small_mm1()
    recompute_blocks(model, "selective")
    return model


def both() -> MM1:
    model = recomputing()
    compile_blocks(model, backend="eager")
    return model


MODELS = {
    "mixture": small_mm1,
    "dense, untied": lambda: small_mm1(experts=0, experts_per_token=0, tied=False),
    "torch's experts": lambda: small_mm1(moe_backend="torch"),
    "another connector": other_connector,
    "bf16": lambda: small_mm1().bfloat16(),
    "loaded": loaded,
    "after generate": generated,
    "compiled": compiled,
    "recomputing": recomputing,
    "recomputing, compiled": both,
}


@way
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_model_has_the_same_logits_and_weights_of_its_own(name, way):
    model, batch = MODELS[name](), packed(documents())
    with torch.no_grad():
        truth = logits_of(model, batch)
        other = way(model)
        assert torch.equal(logits_of(other, batch), truth)
        assert (other.config, other.training) == (model.config, model.training)
        other.init_weights(seed=1)
        assert torch.equal(logits_of(model, batch), truth), "the original has changed"
        model.init_weights(seed=1)
        assert torch.equal(logits_of(other, batch), logits_of(model, batch)), "it computes with the original's weights"


@way
def test_a_copy_of_a_model_generates_trains_and_is_compiled_as_the_original(way):
    model, batch = generated(), packed(documents())
    other = way(model)
    texts = generate(model, [["a"], ["b c"]], max_tokens=5)
    assert generate(other, [["a"], ["b c"]], max_tokens=5) == texts
    grads = [torch.autograd.grad(m(batch).loss, list(m.parameters())) for m in (model, other)]
    assert all(map(torch.equal, *grads))
    compile_blocks(other, backend="eager")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


@pytest.mark.slow
def test_another_process_reads_a_saved_model(tmp_path):
    """As multiprocessing's spawn does: nothing of this process is needed."""
    model, batch = small_mm1(), packed(documents())
    torch.save((model, batch), tmp_path / "model.pt")
    code = ("import sys, torch\nmodel, batch = torch.load(sys.argv[1], weights_only=False)\n"
            "torch.save(model.hidden(batch)[0].detach(), sys.argv[1])")  # fmt: skip
    run = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")]
    subprocess.run(run, cwd=ROOT, check=True)
    hidden = model.hidden(batch)[0].detach()
    torch.testing.assert_close(torch.load(tmp_path / "model.pt"), hidden, rtol=1e-5, atol=1e-5)


@way
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_copy_of_an_engine_goes_on_with_what_it_knows_and_a_cache_of_its_own(way, weights, monkeypatch):
    monkeypatch.setattr(packing, "MIN_NUMBERS", 1)
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 1)
    if weights:
        pytest.importorskip("torchao")
    prompt, sampling = ["a b c d e f g h i j k l m n o p q r s t u v w x y z"], Sampling(max_tokens=4)
    engine = Engine(small_mm1().eval(), tokens=512, weights=weights)
    engine.cache.k.zero_()
    first = engine.submit(prompt, sampling)
    engine.run()
    other = way(engine)
    assert other.cache is not engine.cache
    assert other.cache.page_of == engine.cache.page_of
    before = engine.cache.k.clone()
    second = other.submit(prompt, sampling)
    other.run()
    assert second.tokens == first.tokens
    assert second.logprobs == pytest.approx(first.logprobs, abs=1e-5)
    assert second.shared > 0
    assert torch.equal(engine.cache.k, before)
    if engine.one_step:
        assert isinstance(other.one_step, Step)
        assert other.one_step._alive[0] is other.cache.k


@way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_is_packed_anew(way, dtype):
    linear, x = BlockedLinear(torch.randn(40, 24).to(dtype)), torch.randn(3, 24).to(dtype)
    assert torch.equal(way(linear)(x), linear(x))


@way
def test_graphs_are_captured_anew_by_a_copy_of_its_own_weights(way, monkeypatch):
    """On a GPU; here the compiled blocks are seen, which must not be those of the original."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: function(*args))
    decoder = small_mm1().eval().decoder
    cache = Cache(decoder.config, 3, torch.device("cpu"), torch.float32)
    graphs = Graphs(decoder, Head(decoder), cache, 2)
    graphs.captured[graphs.kinds[0]] = graphs.pool = lambda: "of this process"
    other = way(graphs)
    assert (other.captured, other.pool, other.spare) == ({}, None, graphs.spare)

    def logits(of):
        whole = torch.from_numpy(of.inputs(of.kinds[0], [9], [0], [np.array([2], np.int32)]))
        return of.step(whole, None)[0]

    with torch.inference_mode():
        truth = logits(graphs)
        assert torch.equal(logits(other), truth)
        other.decoder.blocks[0].attention.out.weight.zero_()
        assert not torch.equal(logits(other), truth)
        assert torch.equal(logits(graphs), truth)


@way
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_narrow_weights_are_kept_as_they_are(way, how, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 1)
    decoder, head = quantize.quantized(small_mm1().eval().decoder, how)
    other, other_head = way((decoder, head))
    x, positions, ends = torch.randn(3, 32), torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    with torch.no_grad():
        found, truth = (h(d(x, positions, ends)[0]) for d, h in ((other, other_head), (decoder, head)))
    assert torch.equal(found, truth)


@way
def test_batches_and_grids_are_equal_field_by_field(way):
    batch = packed(documents())
    other = way(batch)
    for mine, its in ((batch, other), (batch.media, other.media)):
        for name, a in vars(mine).items():
            b = getattr(its, name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else isinstance(a, Grids | PackedMedia) or a == b
            assert same, name
    grids = Grids([(2, 4), (4, 4)], images=3, patches=30, merge=2)
    grids.to("meta")
    other = way(grids)
    assert all(map(torch.equal, other.tensors, grids.tensors))
    assert (other.sizes, other.used, other.longest, other.merge) == (
        grids.sizes,
        grids.used,
        grids.longest,
        grids.merge,
    )
    empty = way(Grids([]))
    assert empty.images == 0
