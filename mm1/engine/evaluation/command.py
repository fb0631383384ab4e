"""Define the commands `mm1 eval`, `mm1 probe` and `mm1 scaling`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mm1.engine.evaluation.config import UNSET, Decoding, ProbeSettings, ShotSettings
from mm1.errors import require


def eval(
    checkpoint: Path,
    benchmark: str,
    /,
    data: tuple[Path, ...],
    out: Path,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 64,
    weights: Literal["int8", "int4", "float8"] | None = None,
    shots: tuple[int, ...] = (0, 4, 8),
    shots_from: Annotated[tuple[Path, ...], UNSET] = (),
    seed: tuple[int, ...] = (0,),
    shot_settings: Annotated[ShotSettings, tyro.conf.arg(name="")] = ShotSettings(),
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding(),
) -> None:
    """Evaluate with few-shot prompts: captions by CIDEr, questions by VQA accuracy, options by their log-probability.

    An interrupted evaluation continues where it stopped. Scores have 95 % intervals from resampling the questions. The
    last line of standard output is one JSON object.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        benchmark: coco, nocaps, textcaps, vqav2, okvqa, textvqa, vizwiz, scienceqa, seed or mmmu.
        data: the benchmark's folder, or its files.
        out: folder for the predictions, one line for each sample.
        images: folder that has the images, also in subfolders (default: that of the data).
        split: split to evaluate (default: test for coco and scienceqa, image for seed, validation for mmmu, else val).
        limit: samples to evaluate, drawn at random with the first seed (default: all).
        batch: limit of prompts that are computed together.
        weights: round the decoder's weights to fewer bits (default: no rounding).
        shots: examples in a prompt; several numbers are evaluated one after the other.
        shots_from: folder or files to draw examples from (default: the training split in --data, or else the evaluated
            samples, without those of the query's image).
        seed: seed of the draw of examples; several are evaluated one after the other, and their mean and standard
            deviation shown.
    """
    from mm1 import load
    from mm1.engine.evaluation.evaluate import evaluate, samples_of, show

    samples, pool = samples_of(benchmark, data, images, split, shots_from, limit, *seed[:1])
    report = evaluate(
        load(checkpoint), benchmark, samples, pool, out, shots=shots, shot_settings=shot_settings, seeds=seed,
        decoding=decoding, batch=batch, weights=weights,
    )  # fmt: skip
    print(show(report))
    print(json.dumps(report))


def probe(
    checkpoint: Path,
    data: Path,
    /,
    kind: Literal["attentive", "linear", "knn"] = "attentive",
    layers: Literal["best", "last", "all"] = "best",
    mask: Literal["full", "causal"] = "full",
    test: Annotated[tuple[Path, ...], UNSET] = (),
    cache: Path = Path("runs/features"),
    plot: Path | None = None,
    settings: Annotated[ProbeSettings, tyro.conf.arg(name="")] = ProbeSettings(),
) -> None:
    """Train a probe on the frozen features of labelled images, and score it on test images.

    The probe's settings are chosen on a tenth of the training images. The features of each image are computed once and
    kept. The last line of standard output is one JSON object.

    Args:
        checkpoint: a checkpoint folder, the folder of a run, or a named size with random weights, such as aim-clipart.
        data: a folder with a sub-folder for each class, a tar with .cls files, or parquet with a column label; a folder
            with the sub-folders train and test (or val) has both.
        kind: an attentive probe as AIM's, a linear one on the mean of an image's features, or its nearest neighbours.
        layers: last is the output after the final norm; all gives the accuracy of each block; best is the mean of a
            quarter of the blocks, at most six, chosen by neighbours among training images.
        mask: each patch sees its whole image, or the patches before it.
        test: paths of test images (default: the sub-folder of data, or else a fifth of each class).
        cache: folder of the features.
        plot: picture of the accuracy by layer to write, such as layers.png (default: none).
    """
    from mm1 import load
    from mm1.engine.data.sources import open_source
    from mm1.engine.evaluation.probes_images import draw_layers, find, probe, show

    require(plot is None or layers != "last", "layers", layers, "all or best, for a plot")
    train_paths, test_paths = find(data, test)
    train = open_source("images", train_paths, Path())
    unseen = open_source("images", test_paths, Path()) if test_paths else None
    report = probe(load(checkpoint), train, unseen, cache, kind=kind, layers=layers, mask=mask, settings=settings)
    print(show(report))
    print(json.dumps(report))
    if plot:
        draw_layers(report, plot)


def scaling(
    runs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN|FILE.csv")] = (),
    /,
    predict: Annotated[tuple[str, ...], UNSET] = (),
    metric: str = "loss",
    part: str | None = None,
    plot: Path | None = None,
) -> None:
    """Fit a scaling law to the final losses of runs: L = E + A·N^-α + B·D^-β.

    N: parameters without the rows of the vocabulary, D: targets seen. At least four runs of two sizes are needed, and
    six of three sizes and three D if D varies. Constants have 95 % intervals, and the largest model's loss is predicted
    from the others. The last line of standard output is one JSON object.

    Args:
        runs: folders of runs, and CSV files with the columns parameters, loss and, if known, samples (required).
        predict: sizes to predict the loss of, such as N=13e9 or N=13e9,D=2e12 (default: none).
        metric: loss in metrics.jsonl; its mean over the last 5 % of the steps counts.
        part: part of the models whose parameters count, such as vision or decoder (default: all).
        plot: picture of the law to write, such as scaling.png (default: none).
    """
    from mm1.engine.evaluation.scaling import report, show
    from mm1.engine.evaluation.scaling_points import draw, place, read_points

    points = read_points(runs, metric, part)
    result, one, many = report(points, {text: place(text) for text in predict})
    print(show(result))
    print(json.dumps(result))
    if plot:
        draw(points, one, many, plot)
