"""The command `mm1 eval`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

UNSET = tyro.conf.arg(help_behavior_hint="")  # the help text says what the default means


@dataclass(frozen=True)
class ShotOptions:
    """The examples in a prompt."""

    shots: tuple[int, ...] = (0, 4, 8)
    """examples in a prompt; several numbers are evaluated one after the other."""
    shots_from: Annotated[tuple[Path, ...], UNSET] = ()
    """folder or files to draw examples from (default: the training split in --data, or else the evaluated samples,
    without those of the query's image)."""
    choose: Literal["random", "fixed", "similar"] = "random"
    """draw examples at random for each query, take the same for all, or take those with the most similar images."""
    seed: tuple[int, ...] = (0,)
    """seed of the draw; several are evaluated one after the other, and their mean and standard deviation shown."""
    text_shots: bool = False
    """begin zero-shot prompts with two examples without images, as Flamingo does and MM1 does not."""
    high: Annotated[int | None, UNSET, tyro.conf.arg(metavar="INT")] = None
    """give only this many of a prompt's last images their parts (default: all)."""


@dataclass(frozen=True)
class DecodingOptions:
    """How answers are chosen."""

    num_beams: int = 1
    """texts that beam search keeps; 1: greedy. OpenFlamingo has 3."""
    length_penalty: float = 0.0
    """beam search divides a text's log-probability by its length to the power of this, -10 to 10; OpenFlamingo has 0,
    its first version -2."""
    normalize: Annotated[Literal["sum", "mean"] | None, UNSET, tyro.conf.arg(metavar="{sum,mean}")] = None
    """compare options by the sum or the mean of their tokens' log-probabilities (default: mean for seed, else sum)."""


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
    examples: Annotated[ShotOptions, tyro.conf.arg(name="")] = ShotOptions(),
    answers: Annotated[DecodingOptions, tyro.conf.arg(name="")] = DecodingOptions(),
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
        batch: most prompts that are computed together.
        weights: round the decoder's weights to fewer bits (default: no rounding).
    """
    from mm1 import load
    from mm1.engine.evaluation.evaluate import Decoding, How, evaluate, samples_of, show

    how = How(examples.choose, text_shots=examples.text_shots, high=examples.high)
    decoding = Decoding(answers.num_beams, answers.length_penalty, normalize=answers.normalize)
    samples, pool = samples_of(benchmark, data, images, split, examples.shots_from, limit, *examples.seed[:1])
    report = evaluate(
        load(checkpoint), benchmark, samples, pool, out, shots=examples.shots, how=how, seeds=examples.seed,
        decoding=decoding, batch=batch, weights=weights,
    )  # fmt: skip
    print(show(report))
    print(json.dumps(report))
