"""Define the command `mm1 eval`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mm1.engine.evaluation.config import UNSET, Decoding, ShotSettings


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
