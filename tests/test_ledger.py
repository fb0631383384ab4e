"""The ledger against torch's FlopCounterMode, which counts the same model with this project's ops in plain torch."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from small import DOCUMENTS, IMAGE, PATCH, document, documents, packed, small_model
from torch.utils.flop_counter import FlopCounterMode

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Budget
from mm1.engine.layers import connector, vision
from mm1.engine.layers import decoder as decoder_module
from mm1.engine.layers.config import Connector
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.workload import Workload
from mm1.engine.models import mm1 as model_module
from mm1.engine.models.mm1 import MM1, parameter_counts
from mm1.engine.models.mm1_config import D_1B, MODELS, MM1Config
from mm1.engine.train.ledger import ledger, workload
from mm1.kernels.attention import Causal

ROOMY = Budget(tokens=120, media=9, patches=80, documents=8)
DENSE, MIXTURE = small_model(experts=0), small_model(experts=4, moe_every=2)
VARIANTS = {
    "dense": DENSE,
    "mixture": MIXTURE,
    "every layer a mixture, its own head": small_model(experts=3, experts_per_token=1, moe_every=1, tied=False),
    "class token": dataclasses.replace(DENSE, vision=dataclasses.replace(DENSE.vision, class_token=True)),
    "average": dataclasses.replace(DENSE, connector=Connector("average", tokens=4, readout_depth=1)),
    "deep abstractor": dataclasses.replace(
        DENSE, connector=Connector(tokens=4, hidden=24, depth=2, position_grid=None)
    ),
    "same width": dataclasses.replace(DENSE, connector=Connector(tokens=4, hidden=32, depth=1, readout_depth=3)),
    "no blocks": dataclasses.replace(DENSE, connector=Connector(tokens=4, depth=0)),
    "attention pool": dataclasses.replace(DENSE, connector=Connector("attention", tokens=4)),
}


def plain_attention(q, k, v, cu_seqlens, *, mask, cu_seqlens_k=None, max_length=None):
    """Every pair of a segment is multiplied, also those that causal masks."""
    rows = zip(pairwise(cu_seqlens.tolist()), pairwise((cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()))
    parts = []
    for (begin, end), (first, last) in rows:
        a, b, c = (x.transpose(0, 1) for x in (q[begin:end], k[first:last], v[first:last]))
        b, c = (x.repeat_interleave(len(a) // len(x), 0) for x in (b, c))
        scores = torch.bmm(a, b.transpose(1, 2)) * q.shape[2] ** -0.5
        if mask == Causal():
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        parts.append(torch.bmm(scores.softmax(-1), c).transpose(0, 1))
    return F.pad(torch.cat(parts), (0, 0, 0, 0, 0, len(q) - int(cu_seqlens[-1])))


def plain_embedding(pixels, grids, weight, bias, table, *, patch_size, mean, std, interpolation):
    p = patch_size
    x = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
    parts = x.split([h * w * p * p for h, w in grids.sizes])
    cut = [part.view(h, p, w, p, 3).transpose(1, 2).reshape(h * w, -1) for part, (h, w) in zip(parts, grids.sizes)]
    places = [
        F.interpolate(table.permute(2, 0, 1)[None], size, mode=interpolation, antialias=True)[0].flatten(1).t()
        for size in grids.sizes
    ]
    absent = (0, 0, 0, grids.patches - grids.used)
    return F.linear(F.pad(torch.cat(cut), absent), weight) + F.pad(torch.cat(places), absent), grids.cu_seqlens


def plain_block(x, grids, weights, pool=None):
    """Rows of no image are one more image, a row high; the depthwise convolution is a product channel by channel."""

    def conv_norm(x, name):
        product = F.linear(x, weights[f"{name}.conv.weight"].flatten(1))
        return F.layer_norm(product, product.shape[1:], weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"])

    sizes = [(h, w) for _, n, h, w in grids.table.tolist() if n]
    absent = [(1, n)] if (n := grids.patches - sum(h * w for h, w in sizes)) else []
    channels, each = len(weights["conv1.conv.weight"]), [h * w for h, w in (*sizes, *absent)]
    a = F.silu(conv_norm(x, "conv1")).split(each)
    kernel = weights["conv2.conv.weight"].flatten(1)[:, None]
    u = torch.cat([
        torch.bmm(kernel, F.unfold(part.t().view(1, channels, h, w), 3, padding=1).view(channels, 9, h * w))[:, 0].t()
        for part, (h, w) in zip(a, (*sizes, *absent))
    ])  # fmt: skip
    b = F.silu(F.layer_norm(u, (channels,), weights["conv2.bn.weight"], weights["conv2.bn.bias"])).split(each)
    mean = torch.stack([*(part.mean(0) for part in b[: len(sizes)]), *x.new_zeros(grids.images - len(sizes), channels)])
    hidden = F.silu(F.linear(mean, weights["se.fc1.weight"].flatten(1), weights["se.fc1.bias"]))
    gate = torch.sigmoid(F.linear(hidden, weights["se.fc2.weight"].flatten(1), weights["se.fc2.bias"]))
    c = torch.cat([part * (gate[i] if i < len(sizes) else 1) for i, part in enumerate(b)])
    y = F.silu(conv_norm(c, "conv3") + (conv_norm(x, "downsample") if "downsample.conv.weight" in weights else x))
    return y if pool is None else plain_pool(y, grids, pool)


def plain_pool(x, grids, out):
    images = [
        F.adaptive_avg_pool2d(x[first : first + n].t().view(-1, h, w), out).flatten(1).t() if n
        else x.new_zeros(out[0] * out[1], x.shape[1])
        for first, n, h, w in grids.table.tolist()
    ]  # fmt: skip
    return torch.cat(images)


def plain_experts(x, routing, gate_up, down):
    y = torch.zeros_like(x)
    for e in range(len(down)):
        rows, choice = torch.where(routing.index == e)
        gate, up = F.linear(x[rows], gate_up[e]).chunk(2, -1)
        y = y.index_add(0, rows, F.linear(F.silu(gate) * up, down[e]) * routing.weight[rows, choice][:, None])
    return y


def plain_head(x, weight, targets, *, reduction):
    return F.cross_entropy(F.linear(x, weight), targets.long(), reduction=reduction)


@pytest.fixture
def plain(monkeypatch):
    """A model all of whose products are torch's own."""

    def make(c: MM1Config) -> MM1:
        monkeypatch.setattr(decoder_module, "attention", plain_attention)
        monkeypatch.setattr(vision, "attention", plain_attention)
        monkeypatch.setattr(vision, "patch_embed", plain_embedding)
        monkeypatch.setattr(connector, "attention", plain_attention)
        monkeypatch.setattr(connector, "conv_block", plain_block)
        monkeypatch.setattr(connector, "adaptive_pool", plain_pool)
        monkeypatch.setattr(model_module, "linear_cross_entropy", plain_head)
        model = MM1(c).init_weights()
        for module in model.modules():
            if isinstance(module, Experts):
                module.backend = plain_experts
        return model

    return make


def counted(model: MM1, batch, backward: bool) -> dict[str, int]:
    """FlopCounterMode's operations by room; attention's products are the only batched ones of encoder and decoder."""
    with FlopCounterMode(display=False, depth=2) as counter:
        loss = model(batch).loss
        if backward:
            loss.backward()
    found = {room: {str(op): n for op, n in ops.items()} for room, ops in counter.get_flop_counts().items()}
    pairs = {room: found[f"MM1.{room}"].get("aten.bmm", 0) for room in ("vision", "decoder")}
    rooms = {room: sum(found[f"MM1.{room}"].values()) for room in ("vision", "connector", "decoder")}
    return {
        "vision": rooms["vision"] - pairs["vision"],
        "vision attention": pairs["vision"],
        "connector": rooms["connector"],
        "decoder": rooms["decoder"] - pairs["decoder"],
        "decoder attention": pairs["decoder"],
        "head": counter.get_total_flops() - sum(rooms.values()),
    }


def by_room(parts: dict[str, int]) -> dict[str, int]:
    return {
        "vision": parts["patch embedding"] + parts["vision linear"],
        "vision attention": parts["vision attention"],
        "connector": parts["connector"],
        "decoder": parts["decoder linear"] + parts["router"] + parts["experts"],
        "decoder attention": parts["decoder attention"],
        "head": parts["head"],
    }


def full_squares(c: MM1Config, lengths: list[int]) -> int:
    """The pairs that FlopCounterMode counts, and that a causal mask hides."""
    d = c.decoder
    return d.layers * 4 * d.heads * d.head_width * sum(n * n - n * (n + 1) // 2 for n in lengths)


OFTEN = ("dense", "mixture", "class token")
NAMES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("budget", [None, ROOMY], ids=["full", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_are_what_torch_counts(name, budget, plain):
    c, batch = VARIANTS[name], packed(documents(), budget)
    model = plain(c)
    lengths = workload(batch).documents
    found = ledger(c, batch)
    executed = found.forward + found.backward + found.padding
    expected = counted(model, batch, backward=True)
    expected["decoder attention"] -= 3 * full_squares(c, lengths)
    assert by_room(executed) == pytest.approx(expected, rel=0.01)
    assert sum(executed.values()) == pytest.approx(sum(expected.values()), rel=1e-3)


@pytest.mark.parametrize("name", ["dense", "mixture", "class token"])
def test_forward_alone_is_what_torch_counts(name, plain):
    c, batch = VARIANTS[name], packed(documents())
    model, found = plain(c), ledger(c, batch)
    expected = counted(model, batch, backward=False)
    expected["decoder attention"] -= full_squares(c, workload(batch).documents)
    assert by_room(found.forward) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_model_computes_the_same(name, plain, monkeypatch):
    batch = packed(documents(), ROOMY)
    truth = plain(VARIANTS[name])(batch).loss
    monkeypatch.undo()
    assert relative_error(MM1(VARIANTS[name]).init_weights()(batch).loss, truth) < 1e-5


def test_useful_work_does_not_depend_on_budgets():
    for c in VARIANTS.values():
        full, roomy = ledger(c, packed(documents())), ledger(c, packed(documents(), ROOMY))
        assert (full.forward, full.backward, full.useful) == (roomy.forward, roomy.backward, roomy.useful)
        assert not any(full.padding.values())
        for part in ("patch embedding", "vision linear", "connector", "decoder linear"):
            assert roomy.padding[part] > 0, part


def test_useful_work_is_the_sum_of_each_document_alone():
    for name, c in VARIANTS.items():
        if name == "attention pool":  # its queries are projected once a batch
            continue
        alone = [ledger(c, packed([document(*parts)])).useful for parts in DOCUMENTS]
        assert ledger(c, packed(documents())).useful == sum(alone)


def test_documents_padded_to_the_longest_cost_what_the_longest_costs():
    c, lengths = MODELS["mm1-1b"], [200, 150, 1000]
    padded = Workload(lengths, [], 1347, 3000, 0, 0, computed_pairs=3 * 1000 * 1001 // 2,
                      computed_expert_rows=3000, computed_head_rows=3000)  # fmt: skip
    longest = ledger(c, Workload([1000] * 3, [], 3000, 3000, 0, 0))
    assert ledger(c, padded).executed == longest.executed
    assert ledger(c, padded).useful < longest.useful / 2


def test_a_dense_text_model_by_the_published_formula():
    """PaLM's 6N + 12LHQT a token, N with the head and without the embedding; its attention counts all T² pairs."""
    c, T = MM1Config(MODELS["mm1-1b"].vision, MODELS["mm1-1b"].connector, D_1B), 4096
    d = c.decoder
    N = parameter_counts(c)["decoder_non_embedding"] + d.vocabulary * d.width
    per_token = 6 * N + 12 * d.layers * d.heads * d.head_width * T
    found = ledger(c, Workload([T], [], T, T, 0, 0))
    causal = 12 * d.layers * d.heads * d.head_width * (T - 1) // 2  # of them hidden, a token
    assert found.useful == pytest.approx(T * (per_token - causal), rel=1e-3)  # N has norms, which are no products
    # By hand: 24 layers of 4 · 2048² + 3 · 2048 · 5376 and a head of 49152 · 2048 are 1.296e9 parameters; six times
    # that and 12 · 24 · 2048 · 2048.5 of attention are 8.984e9 a token. At 40 000 tokens/s: 359 of 989 TFLOP/s.
    assert found.useful / T == pytest.approx(8.984e9, rel=1e-3)
    assert found.mfu(T / 40_000, 989e12) == pytest.approx(0.3634, rel=1e-3)


def test_recomputed_is_apart_and_counts_in_hfu_alone():
    batch = packed(documents(), ROOMY)
    for c in VARIANTS.values():
        kept, again = ledger(c, batch), ledger(c, batch, recompute="blocks")
        assert kept.useful == again.useful
        assert kept.mfu(2.0, 1e9) == again.mfu(2.0, 1e9) == kept.useful / 2e9
        assert kept.hfu(2.0, 1e9) == kept.executed / 2e9 < again.hfu(2.0, 1e9)
        # Without recomputing only attention's scores, half of its forward; with it also all of the blocks' rows.
        assert {part: 2 * n for part, n in kept.recompute.items()} == {
            part: n + kept.padding[part] // 3 for part, n in kept.forward.items() if "attention" in part
        }
        for part in ("vision linear", "vision attention", "decoder linear", "decoder attention", "router", "experts"):
            expected = kept.forward[part] + kept.padding[part] // 3 + kept.recompute.get(part, 0)
            assert again.recompute[part] == expected, part
        assert not {"connector", "head", "patch embedding"} & set(again.recompute)


def test_patches_have_no_input_gradient_and_class_tokens_are_seen():
    found = ledger(DENSE, packed(documents()))
    assert found.backward["patch embedding"] == found.forward["patch embedding"]
    alone = pack([document((3, 5))], exact_budget([document((3, 5))], PATCH), image_id=IMAGE, patch=PATCH, slots=4)
    v = DENSE.vision
    for kept in (False, True):
        c = dataclasses.replace(DENSE, vision=dataclasses.replace(v, class_token=kept))
        assert ledger(c, alone).forward["vision attention"] == v.layers * 4 * v.width * (15 + kept) ** 2


def test_a_text_only_batch_has_no_vision():
    found = ledger(MIXTURE, packed([document(9)]))
    assert not any(n for part, n in found.totals().items() if part.startswith(("vision", "patch", "connector")))
    assert sum(n for part, n in found.totals().items() if part in found.forward) == found.useful
