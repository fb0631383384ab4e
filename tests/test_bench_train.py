"""Every rung of the ladder of training steps does the same work, and one that does not is not timed."""

import dataclasses
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import relative_error
from small import small_model

from mm1.bench import mix, plain, train
from mm1.bench.peer_models import Abstractor, TransformersModel
from mm1.bench.record import Record
from mm1.engine.layers import connector, decoder, vision
from mm1.engine.train.ledger import workload
from mm1.errors import UserError

MIXTURE = small_model(experts=4)
SQUASHED = dataclasses.replace(
    small_model(experts=0), image_mode="squash",
    vision=dataclasses.replace(MIXTURE.vision, class_token=True, pre_norm=True, activation="quick_gelu"),
    connector=dataclasses.replace(MIXTURE.connector, position_grid=(6, 6)),
)  # fmt: skip
MODELS = {"images of several sizes, mixture": MIXTURE, "images of one size, class token": SQUASHED}
TOKENS, PEAK = 192, 1e9
LADDER = ["plain", "packing", "attention", "vision kernels", "experts", "fused AdamW", "torch.compile",
          "recompute selective", "recompute blocks", "torch.compile only"]  # fmt: skip
PEERS = ["transformers packed", "transformers padded"]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Trace blocks but run them by torch, because Inductor takes a minute, and measure no ceilings."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train, "ceilings", lambda device: {"copy": 1e9, "gemm": {"fp32": PEAK, "bf16": PEAK}})
    monkeypatch.setitem(train.SIZES, "tiny", train.Size(MIXTURE, TOKENS))
    yield
    torch.compiler.reset()


ladder = train.ladder


def steps(c=MIXTURE, dtype="fp32") -> train.Steps:
    return train.Steps(c, TOKENS, "cpu", dtype, PEAK)


def eager(c, dtype="fp32") -> list[train.Rung]:
    return [rung for rung in ladder(c) if not rung.compiled]


def measured(**options) -> dict:
    record = Record()
    train.measure(record, ["tiny"], **options)
    (row,) = record.rows
    return row


def test_every_rung_gives_the_first_ones_loss_and_gradient():
    ways, failed = steps(SQUASHED).check(ladder(SQUASHED))
    assert not failed
    assert list(ways) == [name for name in LADDER if name != "experts"]
    for way in ways.values():
        assert way.results == pytest.approx(ways["plain"].results, rel=1e-5)


@pytest.mark.slow
def test_rungs_agree_in_16_bits_too():
    ways, failed = steps(SQUASHED, "bf16").check(eager(SQUASHED))
    assert not failed
    assert len({way.results["loss"] for way in ways.values()}) > 1  # they do not round alike


@pytest.mark.slow
@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_rungs_give_the_same_gradient_of_every_parameter(c):
    bench = steps(c)
    truth = None
    for rung in eager(c):
        with bench.running(rung):
            nll = sum(bench.model(batch).loss for batch in bench.sets[rung.packed][0])
        grads = torch.autograd.grad(nll, list(bench.model.parameters()))
        truth = truth or grads
        for (name, _), found, expected in zip(bench.model.named_parameters(), grads, truth):
            assert relative_error(found, expected) < 1e-4, (rung.name, name)


def values_alone(self, q, k, v, cu_seqlens, mask, max_length):
    return v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def larger(right):
    return lambda *args, **settings: 1.2 * right(*args, **settings)


WRONG = {
    "packing": (plain.MaskedAttention, "__call__", values_alone),
    # Those below are plain in this too: the first that is not is the one that differs.
    "vision kernels": (plain, "conv_block", larger(plain.conv_block)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rung", WRONG)
def test_a_wrong_rung_is_not_timed_and_says_by_how_much_it_is_off(rung, monkeypatch):
    monkeypatch.setattr(*WRONG[rung])
    ways, failed = steps().check(eager(MIXTURE))
    assert rung in failed
    assert rung not in ways
    assert re.fullmatch(r"(loss differs by \S+ and )?gradient norm differs by \S+ from that of 'plain'", failed[rung])


@pytest.fixture
def eager_peers(monkeypatch):
    pytest.importorskip("transformers")
    every = train.peers
    monkeypatch.setattr(train, "peers", lambda device: [rung for rung in every(device) if not rung.compiled])


@pytest.mark.slow
def test_transformers_is_compiled_too(monkeypatch):
    monkeypatch.setattr(train, "ladder", eager)
    row = measured(rounds=2)
    assert not row["failed"]
    for name in PEERS:
        eager_way, compiled = row["variants"][name], row["variants"][f"{name} compiled"]
        assert eager_way["compile_seconds"] == 0 < compiled["compile_seconds"]
        assert (eager_way["mfu"] * eager_way["median"]) == pytest.approx(compiled["mfu"] * compiled["median"], rel=1e-3)


@pytest.mark.usefixtures("eager_peers")
@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_the_peer_computes_our_loss_and_our_gradient_of_every_part(c):
    bench = steps(c)
    (plain_way,), _ = (list(found.values()) for found in bench.check(eager(c)[:1]))
    ways, failed = bench.check_peers(plain_way)
    assert not failed
    assert list(ways) == PEERS
    for name, way in ways.items():
        assert way.results == pytest.approx(plain_way.results, rel=1e-5), name

    def norms(model, inputs):
        sum(model(x).loss for x in inputs).backward()
        parts = [getattr(model, part) for part in ("vision", "connector", "image_norm", "decoder")]
        found = [[p.grad.norm() for p in part.parameters() if p.grad is not None] for part in parts]
        model.zero_grad(set_to_none=True)
        return [torch.stack(part).norm().item() for part in found]

    expected = norms(bench.model, bench.sets[True][0])
    for inputs in bench.peer_inputs.values():
        assert norms(bench.peer, inputs) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("eager_peers")
def test_a_peer_that_computes_another_loss_is_not_timed(monkeypatch):
    right = Abstractor.forward
    monkeypatch.setattr(Abstractor, "forward", lambda self, features: right(self, features).flip(1))
    monkeypatch.setattr(train, "ladder", lambda c, dtype: eager(c)[:1])
    row = measured(rounds=1)
    assert list(row["failed"]) == PEERS
    for why in row["failed"].values():
        assert re.fullmatch(r"loss differs by \S+ and gradient norm differs by \S+ from that of 'plain'", why)
    assert list(row["variants"]) == ["plain"]


def test_the_peer_gets_the_patches_of_the_images_and_no_others():
    pytest.importorskip("transformers")
    bench, p = steps(), MIXTURE.vision.patch
    peer = TransformersModel(bench.model)
    cut = [
        ((image[y : y + p, x : x + p] / 255 - MIXTURE.vision.mean) / MIXTURE.vision.std).ravel()
        for document in bench.documents
        for image in (view.values for view in document.media)
        for y in range(0, image.shape[0], p)
        for x in range(0, image.shape[1], p)
    ]
    for packed, batches in ((True, bench.sets[True][0]), (False, bench.sets[False][0])):
        patches = np.concatenate([peer.inputs(batch, packed).images[0][0].numpy() for batch in batches])
        in_order = lambda rows: rows[np.lexsort(np.asarray(rows).round(3).T)]  # noqa: E731
        np.testing.assert_allclose(in_order(patches), in_order(np.stack(cut)), atol=1e-5)
    assert {bench.ledger(rung).padding["patch embedding"] for rung in train.peers("cpu")} == {0}


def test_packed_and_padded_documents_cost_the_peer_what_they_cost_it_alone():
    pytest.importorskip("transformers")
    bench = steps()
    peer = TransformersModel(bench.model)
    alone = [mix.packed(MIXTURE, [[d]], len(d.tokens))([d])[0] for d in bench.documents]
    with torch.no_grad():
        truth = sum(peer(peer.inputs(batch, packed=True)).loss for batch in alone)
        for packed, sets in bench.sets.items():
            inputs = [peer.inputs(batch, packed) for batch in sets[0]]
            assert sum(peer(x).loss for x in inputs).item() == pytest.approx(truth.item(), rel=1e-5)
    (row,) = (peer.inputs(batch, packed=True) for batch in bench.sets[True][0])
    lengths = sorted(len(d.tokens) for d in bench.documents)
    assert row.tokens.shape == (1, sum(lengths))
    assert row.decoder["position_ids"][0].tolist() == [place for n in lengths for place in range(n)]


@pytest.mark.usefixtures("eager_peers")
def test_the_peer_needs_no_second_set_of_weights_and_moments():
    bench = steps()
    ways, _ = bench.check_peers()
    owned = lambda tensors: {tensor.untyped_storage().data_ptr() for tensor in tensors}  # noqa: E731
    moments = lambda optimizer: [state["exp_avg"] for state in optimizer.state.values()]  # noqa: E731
    ours = owned(bench.model.parameters())
    before = [p.detach().clone() for p in bench.peer.parameters()]
    own = {name for name, p in bench.peer.named_parameters() if not owned([p]) <= ours}
    assert own == {
        f"decoder.model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in ("q", "k", "v")
    }
    for way in ways.values():
        way.step()
    others = owned(moments(bench.peer_optimizer)) - owned(moments(bench.optimizers[False]))
    assert len(others) == len(own)
    assert all(torch.equal(a, b) for a, b in zip(before, bench.peer.parameters(), strict=True))


@pytest.mark.parametrize("part, changes", [("encoder", {"class_token": True}), ("stages", {})])
def test_a_model_that_transformers_has_no_modules_for_is_said_to_be_one(part, changes):
    pytest.importorskip("transformers")
    kind = "c-abstractor" if changes else "attention"
    c = dataclasses.replace(
        MIXTURE, vision=dataclasses.replace(MIXTURE.vision, **changes),
        connector=dataclasses.replace(MIXTURE.connector, kind=kind),
    )  # fmt: skip
    ways, failed = steps(c).check_peers()
    assert not ways
    assert re.fullmatch(rf"ValueError: \w+ has no {part} that computes? what this model.*", failed["transformers"])


def test_a_gpu_has_two_attentions_more():
    names = [rung.name for rung in train.peers("cuda")]
    assert names[::2] == [*PEERS, "transformers flash", "transformers flex"]
    assert names[1::2] == [f"{name} compiled" for name in names[::2]]


@pytest.mark.usefixtures("eager_peers")
def test_a_rung_that_raises_is_listed_with_its_reason_and_the_others_go_on(monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("no such kernel\nat a place")

    monkeypatch.setattr(plain.MaskedAttention, "__call__", broken)
    monkeypatch.setattr(train, "ladder", eager)
    row = measured(rounds=2)
    assert row["failed"] == {"packing": "RuntimeError: no such kernel"}
    assert list(row["variants"]) == ["plain", "attention", "vision kernels", "experts", "fused AdamW", *PEERS]


@pytest.mark.usefixtures("eager_peers")
def test_the_row_has_what_the_report_reads(capsys):
    row = measured(rounds=2)
    assert not row["failed"]
    assert {"bench": "train", "model": "tiny", "dtype": "fp32", "what": "step", "mode": "host"}.items() <= row.items()
    assert list(row["variants"]) == [*LADDER, *PEERS]
    assert set(row["shape"]) >= {"tokens", "images", "documents"}
    assert {"useful", "padding", "recompute", "experts", "head"} <= set(row["ledger"])
    wanted = {"median", "low", "high", "n", "samples", "tokens_per_s", "images_per_s", "mfu", "hfu", "data_wait",
              "compile_seconds", "recompiles", "peak_bytes", "ratio"}  # fmt: skip
    for name, variant in row["variants"].items():
        assert wanted <= set(variant), name
        assert variant["n"] == len(variant["samples"]) == 2
        assert variant["tokens_per_s"] == pytest.approx(row["shape"]["tokens"] / variant["median"], rel=1e-3)
        assert 0 < variant["mfu"] < variant["hfu"]
        assert 0 < variant["data_wait"] < 1
        assert variant["peak_bytes"] is None
        # Only the ladder's have a change to the one before.
        assert ("change" in variant) == (name not in ("torch.compile only", *PEERS))
    useful = row["ledger"]["useful"]
    for name in LADDER:
        variant = row["variants"][name]
        assert variant["mfu"] == pytest.approx(useful / (variant["median"] * PEAK), rel=1e-3)
    assert row["variants"]["plain"]["ratio"]["median"] == 1
    assert row["variants"]["torch.compile"]["compile_seconds"] >= 0
    assert row["variants"]["torch.compile"]["recompiles"] == 0  # budgets make shapes static
    assert row["variants"]["fused AdamW"]["compile_seconds"] == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in LADDER)


@pytest.mark.usefixtures("eager_peers")
def test_a_row_that_is_there_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(train, "ladder", lambda c, dtype: eager(c)[-1:])
    record = Record()
    for _ in range(2):
        train.measure(record, ["tiny"], rounds=1)
    assert len(record.rows) == 1
    assert record.header["ceilings"]["gemm"]["fp32"] == PEAK


@pytest.mark.parametrize("options, message", [
    ({"models": ["mm1-2b"]}, "unknown size 'mm1-2b'; known: digits, mm1-1b, "),
    ({"models": ["tiny"], "rounds": 0}, "rounds is 0, expected at least 1"),
])  # fmt: skip
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UserError) as error:
        train.measure(Record(), **options)
    assert str(error.value).startswith(message)


def test_padding_is_in_the_ledger_and_shrinks_up_the_ladder():
    bench = steps()
    rungs = {rung.name: rung for rung in train.ladder(MIXTURE)}
    found = {name: bench.ledger(rung) for name, rung in rungs.items()}
    assert len({ledger.useful for ledger in found.values()}) == 1
    padding = {name: sum(ledger.padding.values()) for name, ledger in found.items()}
    assert min(padding["plain"], padding["packing"]) > padding["attention"] == padding["torch.compile"] > 0
    # By hand: rows of the padded documents beyond their own tokens, forward and twice that backward.
    shape, d = bench.shape, MIXTURE.decoder
    per_row = 2 * d.layers * (2 * d.width * d.heads * d.head_width + 2 * d.width * d.kv_heads * d.head_width)
    per_row += 2 * 3 * d.width * d.ffn  # one dense layer of two
    absent = shape["documents"] * shape["longest"] - shape["tokens"]
    assert shape["padded"] == shape["documents"] * shape["longest"]
    assert found["plain"].padding["decoder linear"] == 3 * absent * per_row
    assert found["plain"].padding["experts"] == 3 * absent * d.experts_per_token * 6 * d.width * d.ffn
    # A dense mask computes all pairs of the sequence.
    pairs = 4 * d.layers * d.heads * d.head_width
    assert (
        found["packing"].padding["decoder attention"]
        == 3 * (pairs * TOKENS**2) - 3 * (found["packing"].forward["decoder attention"])
    )
    blocks = {"vision linear", "vision attention", "decoder linear", "decoder attention", "router", "experts"}
    assert set(found["recompute blocks"].recompute) == blocks


def test_what_the_peer_computes_beyond_is_padding_too():
    bench, d = steps(), MIXTURE.decoder
    padding = {rung.name: bench.ledger(rung).padding for rung in train.peers("cuda")}
    packed, padded, flash = (padding[f"transformers {name}"] for name in ("packed", "padded", "flash"))
    lengths = [len(document.tokens) for document in bench.documents]
    hidden = sum(lengths) ** 2 - sum(n * (n + 1) // 2 for n in lengths)
    assert packed["decoder attention"] == 3 * hidden * 4 * d.layers * d.heads * d.head_width
    assert packed["decoder linear"] == packed["experts"] == packed["head"] == flash["decoder attention"] == 0
    v = MIXTURE.vision
    for packed_too, ledger in ((True, packed), (False, padded)):
        images = [[h * w for h, w in batch.media.grids.sizes] for batch in bench.sets[packed_too][0]]
        hidden = sum(sum(batch) ** 2 - sum(n * n for n in batch) for batch in images)
        assert ledger["vision attention"] == 3 * hidden * 4 * v.layers * v.width
    assert padded["head"] == 3 * (bench.shape["padded"] - bench.shape["targets"]) * 2 * d.width * d.vocabulary


def test_steps_leave_the_weights_and_the_modules_as_they_were():
    bench = steps()
    before = [p.detach().clone() for p in bench.model.parameters()]
    functions = decoder.attention, vision.attention, vision.patch_embed, connector.conv_block
    backends = [m.backend for m in bench.model.modules() if hasattr(m, "backend")]
    for rung in eager(MIXTURE):
        bench.step(rung, bench.sets[rung.packed][0])
    assert all(torch.equal(a, b) for a, b in zip(before, bench.model.parameters()))
    assert functions == (decoder.attention, vision.attention, vision.patch_embed, connector.conv_block)
    assert backends == [m.backend for m in bench.model.modules() if hasattr(m, "backend")]
    assert not any("forward" in vars(m) for m in bench.model.modules())


def test_both_optimizers_move_the_same_weights_by_the_same_moments():
    bench = steps()
    fused, eager_ = bench.optimizers[False], bench.optimizers[True]
    for p, state in fused.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert eager_.state[p][name] is state[name]
    assert all(group["fused"] for group in fused.param_groups)
    assert not any(group["fused"] for group in eager_.param_groups)


def test_documents_fill_a_sequence_with_the_mixs_shares():
    c, tokens = train.SIZES["mm1-1b"].model, 16 * 4096
    docs = mix.documents(dataclasses.replace(c, image_size=14), tokens, 0)
    lengths = {kind: sum(len(d.tokens) for d in docs if d.key == kind) for kind in mix.SHARES}
    assert 0.99 * tokens < sum(lengths.values()) <= tokens
    for kind, share in mix.SHARES.items():
        assert lengths[kind] / tokens == pytest.approx(share, abs=0.03)
    assert {len(d.media) for d in docs if d.key == "captions"} == {1}
    assert {len(d.media) for d in docs if d.key == "interleaved"} == {2, 3, 4, 5}
    for d in docs:
        text = d.tokens[(d.tokens != mix.IMAGE)]
        assert (d.tokens == mix.IMAGE).sum() == 144 * len(d.media)
        assert text[0] == mix.BOS
        assert text[-1] == mix.EOS
        assert ((text[1:-1] > mix.IMAGE) & (text[1:-1] < c.decoder.vocabulary)).all()


def test_documents_follow_from_the_seed():
    a, b, other = (mix.documents(MIXTURE, TOKENS, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))
    assert [x.tokens.tolist() for x in a] != [x.tokens.tolist() for x in other]
    assert len({view.values.shape for d in a for view in d.media}) > 1


def test_padded_batches_hold_the_same_documents():
    docs = mix.documents(MIXTURE, TOKENS, 0)
    batches = mix.padded(MIXTURE, TOKENS)(docs)
    (one,) = mix.packed(MIXTURE, [docs], TOKENS)(docs)
    longest = max(len(d.tokens) for d in docs)
    assert len(batches) > 1
    assert all(len(batch.tokens) <= TOKENS for batch in batches)
    assert sum(batch.target_count for batch in batches) == one.target_count
    rows = torch.cat([batch.tokens.view(-1, longest) for batch in batches])
    for row, d in zip(rows, docs, strict=True):
        assert row.tolist() == d.tokens.tolist() + [mix.PAD] * (longest - len(d.tokens))
    load, packed = mix.load_of_padded(docs, batches), workload(one)
    assert sorted(load.documents) == sorted(packed.documents)
    assert sorted(load.grids) == sorted(packed.grids)
    assert load.targets == packed.targets


def test_nothing_but_torch_triton_and_numpy_is_needed():
    code = """
import sys
for name in ("tokenizers", "PIL", "grain", "transformers", "timm", "pynvml", "tyro", "safetensors"):
    sys.modules[name] = None
from mm1.bench import train
from mm1.bench.record import Record
train.SIZES["tiny"] = train.SIZES["digits"]._replace(tokens=96)
train.ladder = lambda c, dtype: [train.Rung("packing", "")]
record = Record()
record.header["ceilings"] = {"gemm": {"fp32": 1e9}}
train.measure(record, ["tiny"], rounds=1)
print(list(record.rows[0]["variants"]), record.rows[0]["failed"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "['packing'] {'transformers': 'not installed'}"


@pytest.mark.parametrize("kind", ["c-abstractor", "average"])
def test_the_peers_connector_has_our_connectors_parameters(kind):
    pytest.importorskip("timm")
    connector_config = dataclasses.replace(MIXTURE.connector, kind=kind, position_grid=None)
    c = dataclasses.replace(MIXTURE, connector=connector_config)
    ours = connector.build_connector(c.connector, c.vision.width, c.decoder.width)
    theirs = dict(Abstractor(c, ours).named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(theirs[name] is parameter for name, parameter in ours.named_parameters())
