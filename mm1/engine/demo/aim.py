"""Pre-train a small AIM on the shipped clip art (`mm1 demo aim`), and compare it with itself before and with PCA."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.codecs import codec_of
from mm1.engine.data.lines import read_lines
from mm1.engine.data.record import Media
from mm1.engine.data.sources import Source, open_source
from mm1.engine.demo.aim_page import write_page
from mm1.engine.demo.next_patches import losses
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.evaluation.probes import knn, linear
from mm1.engine.evaluation.probes_images import probe
from mm1.engine.evaluation.probes_train import Labelled
from mm1.engine.run_config import Run, load_run
from mm1.engine.train import checkpoint
from mm1.engine.train.trainer import train
from mm1.errors import UserError

FOLDER = Path(__file__).parent.parent / "data" / "clipart"
STEPS = 500
PROBE = ProbeSettings(rates=(3e-4, 1e-3, 3e-3), decays=(0.1,), epochs=30)
COMPONENTS = 128  # of the PCA: as many as the encoder's features have


def run_of(folder: Path, steps: int) -> Run:
    """Return the demo's run on the training images in `folder`."""
    source = f'data.sources=[{{kind="images", paths={json.dumps([str(folder / "train.tar.gz")])}}}]'
    # A higher rate than the paper's, for so few parameters and steps.
    return load_run("aim-clipart", [source, f"train.steps={steps}", "train.peak_lr=2e-3"])


def demo(out: Path, folder: Path = FOLDER, steps: int = STEPS, settings: ProbeSettings = PROBE) -> dict[str, Any]:
    """Train in the folder `out`, evaluate, write report.html and summary.json; return the summary.

    folder: has train.tar.gz and test.tar.gz. settings: of the attentive and linear probes. An interrupted run is
    resumed, a complete one is only evaluated. Raises UserError if the folder `out` has another run.
    """
    run = run_of(folder, steps)
    try:
        train(run, out, resume=True)
    except UserError as error:
        raise UserError(f"{error} (delete {out} to train the demo anew)") from None
    metrics = [line for line in read_lines(out / "metrics.jsonl")[0] if "seconds" in line]  # a bad step has none
    begin = time.perf_counter()
    known, unseen = (open_source("images", str(folder / f"{part}.tar.gz"), Path()) for part in ("train", "test"))
    models = {"untrained": checkpoint.load("aim-clipart"), "trained": checkpoint.load(out)}
    (pixels, labels), (test_pixels, test_labels) = images_of(known, run), images_of(unseen, run)
    classes = sorted({*labels, *test_labels})
    accuracy = {"pixels": pixel_scores(pixels, labels, test_pixels, test_labels, settings)}
    for name, model in models.items():
        accuracy[name] = {
            kind: _score(probe(model, known, unseen, out / "features", kind=kind, settings=settings))
            for kind in ("knn", "attentive")
        }
    device = next(models["trained"].parameters()).device
    by_position = {name: losses(model, test_pixels.to(device)).tolist() for name, model in models.items()}
    summary = {
        "train_seconds": round(sum(m["seconds"] for m in metrics), 1),
        "train_loss": round(float(np.mean([m["loss"] for m in metrics[-20:]])), 4),
        "test_loss": {name: round(float(np.mean(values)), 4) for name, values in by_position.items()},
        "accuracy": accuracy, "classes": len(classes), "test_images": len(test_labels),
        "evaluate_seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    curve = [(m["step"], m["loss"]) for m in metrics]
    write_page(out / "report.html", summary, curve, by_position, models["trained"], test_pixels.to(device))
    _tell(out, summary)
    return summary


def images_of(source: Source, run: Run) -> tuple[Tensor, list[str]]:
    """Return the images of a source that have a class, resized, uint8 [N, H, W, 3], and their classes."""
    codec, pixels, labels = codec_of(run.model), list[np.ndarray](), list[str]()
    for record in (source[i] for i in range(len(source))):
        label = next((part for part in record.parts if isinstance(part, str)), None)
        if label is not None:
            medium = next(part for part in record.parts if isinstance(part, Media))
            pixels.append(codec.resize(codec.decode(medium.data)))
            labels.append(label)
    return torch.from_numpy(np.stack(pixels)), labels


def pixel_scores(
    train: Tensor, labels: list[str], test: Tensor, test_labels: list[str], settings: ProbeSettings
) -> dict[str, Any]:
    """Return the scores of the first principal components of the pixels, of which a linear probe is the attentive one.

    train, test: uint8 [N, H, W, 3]. The components are those of the training images.
    """
    names = sorted({*labels, *test_labels})
    x, y = (images.flatten(1).float() / 255 for images in (train, test))
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False)[2][:COMPONENTS].T

    def labelled(rows: Tensor, classes: list[str]) -> Labelled:
        indices = torch.tensor([names.index(name) for name in classes])
        return Labelled.packed((rows - mean) @ axes, torch.arange(len(rows) + 1), indices, names)

    parts = labelled(x, labels), labelled(y, test_labels)
    return {"knn": _score(knn(*parts, seed=settings.seed)), "attentive": _score(linear(*parts, settings))}


def _score(report: dict[str, Any]) -> dict[str, float]:
    """Return the accuracy of a probe's report with its 95 % interval."""
    low, high = report["interval"]
    return {"share": round(report["accuracy"], 4), "low": round(low, 4), "high": round(high, 4)}


def _tell(out: Path, summary: dict[str, Any]) -> None:
    """Print the summary and the commands to try next."""
    print(f"\ntrained in {summary['train_seconds']:.0f} s, evaluated in {summary['evaluate_seconds']:.0f} s")
    print(
        f"loss on unseen drawings: {summary['test_loss']['untrained']} before, {summary['test_loss']['trained']} after"
    )
    print(f"accuracy on {summary['test_images']} unseen drawings of {summary['classes']} classes:")
    print(f"  {'':<10} neighbours   probe")
    for name, scores in summary["accuracy"].items():
        print(f"  {name:<10} {scores['knn']['share']:>10.1%} {scores['attentive']['share']:>7.1%}")
    print(f"\n{out}/ holds checkpoint/, metrics.jsonl, report.html, summary.json. Try next:")
    print(f"  mm1 probe {out}/checkpoint your-pictures/      (a sub-folder for each class)")
    print('  mm1 train aim-clipart --set \'data.sources=[{kind="images", paths=["your-pictures/"]}]\' --out runs/own')
