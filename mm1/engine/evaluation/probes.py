"""Score frozen features by the accuracy of probes that are trained on labelled images: attentive, linear, k-NN.

The settings of a probe are chosen on a tenth of the training images, drawn from each class; a probe with the chosen
settings is then trained on all of them and scored on the test images, which choose nothing. AIM's paper reports the
best of its grid on the evaluated images instead, which is higher.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine.evaluation.bootstrap import interval
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.evaluation.probes_knn import vote_of_nearest
from mm1.engine.evaluation.probes_train import AttentiveHeads, Labelled, LinearHeads, Probe, Trained, train_probes
from mm1.errors import UserError, require

HELD_OUT = 0.1  # share of each class's training images that choose a probe's settings
# Fini et al. 2024 (AIMv2), table A2, and two higher rates for sets of few images, whose probes take few steps.
ATTENTIVE_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
LINEAR_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NEIGHBOURS = (5, 20)


def attentive(
    train: Labelled, test: Labelled, heads: int, settings: ProbeSettings = ProbeSettings(),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Return the report of an attentive probe with as many heads as the encoder has. Raises UserError, see `check`."""
    check(train, test)
    width = train.features.shape[1]
    require(width % heads == 0, "heads", heads, f"a divisor of the features' width {width}")
    classes = len(train.names)
    return _report(
        "attentive", train, test, settings, ATTENTIVE_RATES, device,
        lambda probes, generator: AttentiveHeads(probes, width, heads, classes, generator),
    )  # fmt: skip


def linear(
    train: Labelled, test: Labelled, settings: ProbeSettings = ProbeSettings(), device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return the report of a linear probe on the images' mean features. Raises UserError, see `check`."""
    check(train, test)
    width, classes = train.features.shape[1], len(train.names)
    return _report(
        "linear", train.pooled(), test.pooled(), settings, LINEAR_RATES, device,
        lambda probes, generator: LinearHeads(probes, width, classes, generator),
    )  # fmt: skip


def knn(train: Labelled, test: Labelled, neighbours: Sequence[int] = NEIGHBOURS, seed: int = 0) -> dict[str, Any]:
    """Return the report of the vote of the nearest training images by the cosine of mean features (`probes_knn.py`).

    Raises UserError, see `check`, and for fewer training images than the smallest number of neighbours.
    """
    check(train, test)
    train, test = train.pooled(), test.pooled()
    best, grid = best_of_neighbours(train, seed, neighbours)
    predicted = vote_of_nearest(train.features, train.labels, test.features, best["neighbours"])
    chosen = {"neighbours": best["neighbours"]}
    return {
        "kind": "knn", **scores(test, predicted), "validation": best["validation"], "chosen": chosen, "grid": grid
    }  # fmt: skip


def best_of_neighbours(
    train: Labelled, seed: int, neighbours: Sequence[int] = NEIGHBOURS
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the number of neighbours that is best on held-out training images, and all numbers, with accuracies.

    train: pooled features. Numbers above that of the images are left out. Raises UserError if none remains.
    """
    fitted, held_out = (part.pooled() for part in split(train, seed))
    count, grid = len(fitted.labels), []
    require(min(neighbours) <= count, "neighbours", min(neighbours), f"≤ {count}, the training images that vote")
    for k in (k for k in neighbours if k <= count):
        right = vote_of_nearest(fitted.features, fitted.labels, held_out.features, k) == held_out.labels
        grid.append({"neighbours": k, "validation": right.float().mean().item()})
    return max(grid, key=lambda row: row["validation"]), grid


def check(train: Labelled, test: Labelled) -> None:
    """Raise UserError if a probe cannot be trained and scored on these images.

    Needed are training images of two classes, so that BatchNorm has a variance, and test images, whose classes all have
    training images.
    """
    for name, data in (("training", train), ("test", test)):
        empty = int((data.lengths < 1).sum())
        require(not empty, f"{name} images without features", empty, "none")
    classes = train.labels.unique().tolist()
    if len(classes) < 2:
        named = "".join(f" ({train.names[i]})" for i in classes)
        raise UserError(
            f"classes of the {len(train.labels)} training images: {len(classes)}{named}, expected at least 2"
        )
    require(len(test.labels) > 0, "number of test images", 0, "at least 1")
    if missing := sorted({*test.labels.tolist()} - {*classes}):
        raise UserError(f"class {train.names[missing[0]]!r} has test images and no training image")


def split(data: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """Return the training images that fit probes, and those that choose among them: a tenth of each class, or one.

    A class of one image has none to choose by. If all classes are so, all images do both.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(data.labels), dtype=torch.bool)
    for label in data.labels.unique():
        members = (data.labels == label).nonzero()[:, 0]
        count = min(max(round(HELD_OUT * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held_out.any():
        return data, data
    return data.subset((~held_out).nonzero()[:, 0]), data.subset(held_out.nonzero()[:, 0])


def scores(test: Labelled, predicted: Tensor) -> dict[str, Any]:
    """Return the accuracy of predicted classes int64 [N], its 95 % interval, and the accuracy of each class.

    majority: the accuracy of always predicting the most frequent class of the test images.
    """
    right = (predicted == test.labels).double()
    classes = {}
    for label in test.labels.unique().tolist():
        own = right[test.labels == label]
        classes[test.names[label]] = {"accuracy": own.mean().item(), "images": len(own)}
    return {
        "accuracy": right.mean().item(), "interval": list(interval(right.numpy())),
        "mean_of_classes": sum(row["accuracy"] for row in classes.values()) / len(classes),
        "majority": max(row["images"] for row in classes.values()) / len(right), "images": len(right),
        "classes": classes,
    }  # fmt: skip


def _report(
    kind: str, train: Labelled, test: Labelled, settings: ProbeSettings, rates: Sequence[float],
    device: torch.device | str, make: Callable[[int, torch.Generator], nn.Module],
) -> dict[str, Any]:  # fmt: skip
    """Choose the settings of a probe on held-out training images, train it on all, and return its scores.

    make: returns the heads of so many probes. Raises UserError if every probe of the grid diverges.
    """

    def trained(data: Labelled, probes: Sequence[Probe]) -> Trained:
        heads = make(len(probes), torch.Generator().manual_seed(settings.seed)).to(device)
        return train_probes(heads, data, probes, settings)

    fitted, held_out = split(train, settings.seed)
    probes = [Probe(rate, decay) for rate, decay in product(settings.rates or rates, settings.decays)]
    grid = trained(fitted, probes)
    classes, losses = grid.predict(held_out, settings.batch)
    rows = []
    for probe, predicted, loss, diverged in zip(probes, classes, losses, (grid.diverged | ~losses.isfinite()).tolist()):
        right = (predicted == held_out.labels).float().mean().item()
        outcome = {"validation": None, "loss": None} if diverged else {"validation": right, "loss": loss.item()}
        rows.append({**probe._asdict(), **outcome, "diverged": diverged})
    usable = [row for row in rows if not row["diverged"]]
    if not usable:
        lowest = min(probe.rate for probe in probes)
        raise UserError(f"every {kind} probe diverged, with rates of {lowest:g} and more: try lower ones")
    best = max(usable, key=lambda row: (row["validation"], -row["loss"]))
    chosen = Probe(best["rate"], best["decay"])
    predicted, _ = trained(train, [chosen]).predict(test, settings.batch)
    return {
        "kind": kind, **scores(test, predicted[0]), "validation": best["validation"], "chosen": chosen._asdict(),
        "grid": rows,
    }  # fmt: skip
