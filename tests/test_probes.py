"""Probes on frozen features: a grid trained at once equals each probe alone, neighbours are those of a loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn

from mm1.engine.evaluation import probes
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.evaluation.probes import attentive, knn, linear, scores, split
from mm1.engine.evaluation.probes_knn import nearest, vote_of_nearest
from mm1.engine.evaluation.probes_train import AttentiveHeads, Labelled, LinearHeads, Probe, train_probes
from mm1.errors import UserError

WIDTH, HEADS, CLASSES = 8, 2, 3
GRID = [Probe(1e-3, 0.05), Probe(3e-2, 0.0), Probe(1e-2, 0.1)]
NAMES = ("ant", "bee", "cat")


def labelled(count=20, seed=0, longest=6, signal=0.0, names=NAMES, width=WIDTH):
    """Images of 1 to `longest` patches; one patch of each has its class in the first features."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    labels = torch.arange(count) % len(names)
    x = torch.randn(int(lengths.sum()), width, generator=draw) * torch.linspace(0.5, 3, width) + 1
    x[cu_seqlens[:-1] + lengths // 2, labels] += signal
    return Labelled.packed(x, cu_seqlens, labels, names)


def rows_of(data):
    """Each image's features, by a loop."""
    return [data.features[a : a + n] for a, n in zip(data.first.tolist(), data.lengths.tolist())]


class PlainAttentive(nn.Module):
    """One attentive probe as the paper has it: queries, keys and values of every patch, one image at a time."""

    def __init__(self, heads):
        super().__init__()
        like = {"bias": False, "dtype": torch.float64}
        self.query = nn.Parameter(heads.query[0].detach().clone())
        self.key, self.value = nn.Linear(WIDTH, WIDTH, **like), nn.Linear(WIDTH, WIDTH, **like)
        self.head = nn.Linear(WIDTH, CLASSES, **like)
        for layer, stack in ((self.key, heads.key), (self.value, heads.value), (self.head, heads.head)):
            layer.weight.data = stack[0].detach().clone()

    def forward(self, images):
        return torch.stack([self.head(self.pool(x)) for x in images])

    def pool(self, x):
        q, k, v = (t.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for t in (self.query, self.key(x), self.value(x)))
        return F.scaled_dot_product_attention(q, k, v).flatten()


class PlainLinear(nn.Linear):
    def __init__(self, heads):
        super().__init__(WIDTH, CLASSES, dtype=torch.float64)
        self.weight.data, self.bias.data = heads.head[0].detach().clone(), heads.bias[0, 0].detach().clone()

    def forward(self, images):
        return super().forward(torch.cat(images))


def train_alone(probe, data, settings, pair):
    """Torch's AdamW, BatchNorm and clipping on one probe, in fp64. Returns it and the norm."""
    norm = nn.BatchNorm1d(WIDTH, 1e-6, affine=False, dtype=torch.float64)
    names = dict(probe.named_parameters())
    plain = [p for name, p in names.items() if name in ("query", "bias")]
    others = [p for name, p in names.items() if name not in ("query", "bias")]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": pair.decay}, {"params": plain, "weight_decay": 0}]
    )
    draw, images = torch.Generator().manual_seed(settings.seed), rows_of(data)
    batches = max(len(images) // settings.batch, 1)
    steps, step = settings.epochs * batches, 0
    warmup = round(settings.warmup * steps)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(images), generator=draw).tensor_split(batches):
            step += 1
            rate = pair.rate * step / max(warmup, 1)
            if step > warmup:
                final = min(settings.final_rate, pair.rate)
                rate = final + (pair.rate - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            own = [images[i].double() for i in chosen]
            x = norm(torch.cat(own)).split([len(x) for x in own])
            optimizer.zero_grad()
            F.cross_entropy(probe(list(x)), data.labels[chosen]).backward()
            nn.utils.clip_grad_norm_(probe.parameters(), settings.clip)
            optimizer.step()
    return probe, norm.eval()


KINDS = {
    "attentive": (lambda n, g: AttentiveHeads(n, WIDTH, HEADS, CLASSES, g), PlainAttentive),
    "linear": (lambda n, g: LinearHeads(n, WIDTH, CLASSES, g), PlainLinear),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip, batch", [(3.0, 6), (0.05, 100)])
def test_a_grid_trained_at_once_equals_each_probe_trained_alone(kind, clip, batch):
    make, plain = KINDS[kind]
    data = labelled(seed=1, signal=2.0)
    data = data.pooled() if kind == "linear" else data
    settings = ProbeSettings(epochs=7, batch=batch, warmup=0.2, clip=clip, seed=3)
    initial = make(1, torch.Generator().manual_seed(5)).double()
    together = train_probes(make(3, torch.Generator().manual_seed(5)).double(), data, GRID, settings)
    unseen = labelled(7, seed=9)
    unseen = unseen.pooled() if kind == "linear" else unseen
    classes, losses = together.predict(unseen, 3)
    for i, pair in enumerate(GRID):
        probe, norm = train_alone(plain(initial), data, settings, pair)
        for name, stack in together.heads.named_parameters():
            alone = dict(probe.named_parameters())
            truth = alone.get(name, alone.get(f"{name}.weight", alone.get("weight")))
            assert relative_error(stack[i].squeeze(), truth.squeeze()) < 1e-9, name
        with torch.no_grad():
            truth = probe([norm(x.double()) for x in rows_of(unseen)])
        assert classes[i].tolist() == truth.argmax(1).tolist()
        assert losses[i].item() == pytest.approx(F.cross_entropy(truth, unseen.labels).item(), rel=1e-9)
    assert not together.diverged.any()


def test_the_order_of_products_changes_no_gradient():
    heads = AttentiveHeads(2, WIDTH, HEADS, CLASSES, torch.Generator().manual_seed(0)).double()
    data = labelled(6)
    data = data.subset(data.lengths.argsort())
    with torch.no_grad():
        heads.query.mul_(100)  # uneven attention
    plain = PlainAttentive(heads)
    images = [x.double() for x in rows_of(data)]
    weights = torch.randn(6, CLASSES, dtype=torch.float64)
    truth = torch.autograd.grad((plain(images) * weights).sum(), list(plain.parameters()))
    y = heads(torch.cat(images), data.lengths)
    assert relative_error(y[0], plain(images)) < 1e-12
    for (name, _), own, expected in zip(
        heads.named_parameters(), torch.autograd.grad((y[0] * weights).sum(), list(heads.parameters())), truth
    ):
        assert relative_error(own[0], expected) < 1e-11, name
        assert own[1].count_nonzero() == 0, name


def test_initial_values_are_those_of_the_paper():
    heads = AttentiveHeads(2, 256, 4, 50, torch.Generator().manual_seed(0))
    assert heads.query.std().item() == pytest.approx(0.02, rel=0.15)
    for weight in (heads.key, heads.value, heads.head):
        assert weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
        assert torch.equal(weight[0], weight[1])
    assert sum(p.numel() for p in heads.parameters()) == 2 * (2 * 256**2 + 256 + 256 * 50)


def test_images_by_index_are_those_of_a_loop():
    data = labelled(9)
    chosen = torch.tensor([7, 0, 0, 3])
    x, lengths = data.images(chosen)
    expected = [rows_of(data)[i] for i in chosen]
    assert torch.equal(x, torch.cat(expected))
    assert lengths.tolist() == [len(rows) for rows in expected]
    inner, _ = data.subset(chosen).images(torch.tensor([3, 1]))
    assert torch.equal(inner, torch.cat([expected[3], expected[1]]))
    pooled = data.pooled(chunk=4)
    torch.testing.assert_close(pooled.features, torch.stack([rows.mean(0) for rows in rows_of(data)]))
    assert data.subset(chosen[:0]).pooled().features.shape == (0, WIDTH)


QUICK = ProbeSettings(epochs=25, batch=16, rates=(1e-4, 1e-2))
SCORES = {
    "attentive": lambda train, test: attentive(train, test, HEADS, QUICK),
    "linear": lambda train, test: linear(train, test, QUICK),
    "knn": knn,
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_each_probe_finds_the_classes_and_reports_its_grid(score):
    train, test = labelled(90, signal=12.0, longest=3), labelled(33, seed=1, signal=12.0, longest=3)
    report = score(train, test)
    assert report["accuracy"] > 0.75
    assert report["interval"][0] <= report["accuracy"] <= report["interval"][1]
    assert report["images"] == 33
    assert report["majority"] == pytest.approx(1 / 3)
    assert [row["images"] for row in report["classes"].values()] == [11, 11, 11]
    weighted = sum(row["accuracy"] * row["images"] for row in report["classes"].values()) / 33
    assert weighted == pytest.approx(report["accuracy"])
    assert any(all(row[name] == value for name, value in report["chosen"].items()) for row in report["grid"])
    best = max(row["validation"] for row in report["grid"])
    assert [row["validation"] for row in report["grid"] if report["chosen"].items() <= row.items()] == [best]
    assert report == score(train, test)


def test_a_class_in_one_patch_of_many_needs_attention():
    """The mean of 40 patches hides what one of them shows."""
    sets = []
    for seed, count in ((0, 150), (1, 90)):
        data = labelled(count, seed=seed, longest=2, width=16)
        x = torch.randn(count, 40, 16, generator=torch.Generator().manual_seed(seed))
        x[torch.arange(count), torch.randint(40, (count,)), data.labels] += 6
        sets.append(Labelled.packed(x.flatten(0, 1), torch.arange(count + 1) * 40, data.labels, NAMES))
    settings = ProbeSettings(epochs=40, batch=30, rates=(1e-3, 1e-2))
    assert attentive(*sets, HEADS, settings)["accuracy"] > linear(*sets, settings)["accuracy"] + 0.15


def test_a_probe_that_diverges_is_reported_and_not_chosen():
    train, test = labelled(30, signal=8.0), labelled(12, seed=1, signal=8.0)
    settings = ProbeSettings(epochs=10, batch=10, rates=(1e-2, 1e30), decays=(0.1,))
    report = attentive(train, test, HEADS, settings)
    assert [row["diverged"] for row in report["grid"]] == [False, True]
    assert report["grid"][1]["validation"] is None
    assert report["chosen"] == {"rate": 1e-2, "decay": 0.1}
    alone = attentive(train, test, HEADS, ProbeSettings(epochs=10, batch=10, rates=(1e-2,), decays=(0.1,)))
    assert alone["grid"][0] == report["grid"][0]
    with pytest.raises(UserError, match=r"every linear probe diverged, with rates of 1e\+30 and more"):
        linear(train, test, ProbeSettings(epochs=10, batch=10, rates=(1e30,)))


def test_settings_are_chosen_on_a_tenth_of_each_class_that_the_chosen_probe_trains_on_too(monkeypatch):
    labels = torch.tensor([0] * 40 + [1] * 5 + [2])
    data = Labelled.packed(torch.randn(46, WIDTH), torch.arange(47), labels, NAMES)
    fitted, held_out = split(data, seed=0)
    assert held_out.labels.bincount(minlength=3).tolist() == [4, 1, 0]
    rows = torch.cat([fitted.first, held_out.first])
    assert sorted(rows.tolist()) == list(range(46))
    assert not torch.equal(split(data, seed=1)[1].first, held_out.first)
    single = Labelled.packed(torch.randn(3, WIDTH), torch.arange(4), torch.arange(3), NAMES)
    assert split(single, 0) == (single, single)
    sizes = []

    def counted(heads, data, grid, settings):
        sizes.append((len(data.labels), len(grid)))
        return train_probes(heads, data, grid, settings)

    monkeypatch.setattr(probes, "train_probes", counted)
    linear(data, single, ProbeSettings(epochs=1, rates=(1e-3, 1e-2)))
    assert sizes == [(41, 4), (46, 1)]


def nearest_of_a_loop(train, queries, k):
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, queries))
    return np.array([sorted(range(len(a)), key=lambda i, row=row: (-row[i], i))[:k] for row in b @ a.T])


@pytest.mark.parametrize("k", [1, 5, 30])
def test_neighbours_are_those_of_a_loop_whatever_the_chunks(k):
    draw = np.random.default_rng(0)
    train, queries = draw.normal(size=(30, 7)), draw.normal(size=(11, 7))
    truth = nearest_of_a_loop(train, queries, k)
    for chunk in (1, 90, 1 << 20):
        assert nearest(torch.tensor(train), torch.tensor(queries), k, chunk=chunk).tolist() == truth.tolist()


def test_of_equally_similar_images_the_first_is_nearer():
    train = torch.eye(4)[torch.tensor([2, 0, 1, 0, 0, 3, 1, 0])]
    queries = torch.cat([torch.eye(4), torch.zeros(1, 4)])
    assert nearest(train, queries, 3).tolist() == nearest_of_a_loop(train.numpy(), queries.numpy(), 3).tolist()
    assert nearest(train, queries, 3)[0].tolist() == [1, 3, 4]
    assert nearest(train, queries, 3)[4].tolist() == [0, 1, 2]


def test_of_tied_classes_the_one_of_the_nearest_image_wins():
    train = torch.tensor([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [0, 1]])
    query = torch.tensor([[1.0, 0]])
    assert vote_of_nearest(train, torch.tensor([2, 1, 1, 2, 0]), query, 4).tolist() == [2]
    assert vote_of_nearest(train, torch.tensor([1, 2, 2, 1, 0]), query, 4).tolist() == [1]
    assert vote_of_nearest(train, torch.tensor([2, 1, 1, 2, 0]), query, 3).tolist() == [1]
    assert vote_of_nearest(train, torch.tensor([0, 1, 2, 1, 1]), query[:0], 3).tolist() == []


def test_votes_are_sklearns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    draw = np.random.default_rng(1)
    train, queries, labels = draw.normal(size=(80, 6)), draw.normal(size=(40, 6)), draw.integers(0, 2, 80)
    for k in (1, 5, 21):  # odd numbers of two classes cannot tie
        truth = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
        found = vote_of_nearest(torch.tensor(train), torch.tensor(labels), torch.tensor(queries), k)
        assert found.tolist() == truth.predict(queries).tolist()


def test_scores_of_each_class_and_of_always_the_most_frequent_one():
    test = Labelled.packed(torch.zeros(5, 1), torch.arange(6), torch.tensor([0, 0, 0, 2, 2]), NAMES)
    report = scores(test, torch.tensor([0, 0, 1, 2, 0]))
    assert report["accuracy"] == 0.6
    assert report["mean_of_classes"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert report["majority"] == 0.6
    assert report["classes"] == {
        "ant": {"accuracy": pytest.approx(2 / 3), "images": 3}, "cat": {"accuracy": 0.5, "images": 2}
    }  # fmt: skip


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([0, 0, 0], [0], r"classes of the 3 training images: 1 \(ant\), expected at least 2"),
        ([], [0], "classes of the 0 training images: 0, expected at least 2"),
        ([0], [0], r"classes of the 1 training images: 1 \(ant\), expected at least 2"),
        ([0, 1, 1], [0, 2], "class 'cat' has test images and no training image"),
        ([0, 1], [], "number of test images is 0, expected at least 1"),
    ],
)
def test_images_that_no_probe_can_be_scored_on(train, test, message):
    train, test = (
        Labelled.packed(torch.ones(len(x), WIDTH), torch.arange(len(x) + 1), torch.tensor(x, dtype=torch.int64), NAMES)
        for x in (train, test)
    )
    for score in (lambda: attentive(train, test, HEADS), lambda: linear(train, test), lambda: knn(train, test)):
        with pytest.raises(UserError, match=message):
            score()


def test_other_wrong_input_is_one_line():
    data = labelled(12)
    with pytest.raises(UserError, match="heads is 3, expected a divisor of the features' width 8"):
        attentive(data, data, 3)
    assert knn(data, data)["chosen"] == {"neighbours": 5}  # 20 are more than there are
    with pytest.raises(UserError, match="neighbours is 10, expected ≤ 9, the training images that vote"):
        knn(data, data, (20, 10))
    empty = data._replace(lengths=data.lengths * (torch.arange(12) != 3))
    with pytest.raises(UserError, match="test images without features is 1, expected none"):
        linear(data, empty)
    for wrong in ({"batch": 1}, {"epochs": 0}, {"rates": (0.0,)}, {"rates": (math.nan,)}, {"decays": ()},
                  {"decays": (-1.0,)}, {"warmup": 1.0}, {"clip": 0.0}, {"final_rate": -1.0}):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is "):
            ProbeSettings(**wrong)


def test_a_batch_never_has_one_image():
    for count in (3, 5, 7):
        data = labelled(count, longest=1)
        linear(data, data, ProbeSettings(epochs=2, batch=2))
