"""Train a small MM1 on the shipped handwritten digits (`mm1 demo`), and evaluate it on images it has not seen."""

import gzip
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mm1.engine.data.digits.notations import TITLE
from mm1.engine.data.images import decode
from mm1.engine.data.lines import read_lines
from mm1.engine.data.record import Media
from mm1.engine.data.references import read_image
from mm1.engine.data.sources import open_source
from mm1.engine.evaluation.bootstrap import interval
from mm1.engine.infer.generate import generate
from mm1.engine.infer.prompts import Prompt
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import DIGITS_FOLDER, DIGITS_RUN
from mm1.engine.train import checkpoint
from mm1.engine.train.trainer import train
from mm1.errors import UserError

SHOTS = (0, 4, 8)


def demo(out: Path) -> dict[str, Any]:
    """Train in the folder `out`, evaluate, write loss.png, samples.png and summary.json; return the summary.

    An interrupted run is resumed, a complete one is only evaluated. Raises UserError if the folder has another run.
    """
    try:
        train(DIGITS_RUN, out, resume=True)
    except UserError as error:
        raise UserError(f"{error} (delete {out} to train the demo anew)") from None
    model = checkpoint.load(out)
    metrics = [line for line in read_lines(out / "metrics.jsonl")[0] if "seconds" in line]  # a bad step has none
    seconds = sum(m["seconds"] for m in metrics)
    begin = time.perf_counter()
    images, truths, guesses = captions(model)
    summary = {
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(sum(m["tokens"] for m in metrics) / seconds, 1),
        "exact_match": _by_count(truths, guesses),
        "questions": _score(questions(model)),
        "notations": {f"{shots}-shot": _score(notations(model, shots)) for shots in SHOTS},
        "evaluate_seconds": round(time.perf_counter() - begin, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    pictures = _draw(out, metrics, images, truths, guesses)
    _tell(out, summary, pictures)
    return summary


def captions(model: MM1) -> tuple[list[Image.Image], list[str], list[str]]:
    """Return the test images, their captions, and the model's captions."""
    source = open_source("captions", str(DIGITS_FOLDER / "test-captions.tar.gz"), Path())
    pairs = [source[i].parts for i in range(len(source))]
    images = [decode(image.data) for image, _ in pairs if isinstance(image, Media)]
    truths = [str(text) for _, text in pairs]
    return images, truths, _answer(model, [[image] for image in images])


def questions(model: MM1) -> list[bool]:
    """Return for each question about a test image whether the model answers it correctly, without shots."""
    items = _items("test-interleaved.jsonl.gz")
    prompts = [["quiz\n", _image(item), f"question: {item['question']} answer:"] for item in items]
    return [answer == item["answer"] for answer, item in zip(_answer(model, prompts), items)]


def notations(model: MM1, shots: int) -> list[bool]:
    """Return for each test image whether the model writes it in the notation of `shots` shots (0 to 8).

    The notations of the test never occur in training documents: only the shots show which one is expected.
    """
    items = _items("test-notations.jsonl.gz")
    answers = _answer(model, [notation_prompt(item, shots) for item in items])
    return [answer == item["answer"] for answer, item in zip(answers, items)]


def notation_prompt(item: dict[str, Any], shots: int) -> Prompt:
    """Return the prompt of a line of test-notations.jsonl.gz with `shots` of its shots, in the layout of training."""
    parts: list[str | Image.Image] = [TITLE]
    for shot in item["shots"][:shots]:
        parts += [_image(shot), shot["answer"] + "\n"]
    return [*parts, _image(item)]


def _items(name: str) -> list[dict[str, Any]]:
    with gzip.open(DIGITS_FOLDER / name, "rt") as file:
        return [json.loads(line) for line in file]


def _image(item: dict[str, Any]) -> Image.Image:
    return decode(read_image(item["image"], DIGITS_FOLDER))


def _answer(model: MM1, prompts: Sequence[Prompt]) -> list[str]:
    """Return the line that the model writes after each prompt, 128 prompts at a time."""
    answers: list[str] = []
    for first in range(0, len(prompts), 128):
        answers += generate(model, prompts[first : first + 128], max_tokens=12, stop=("\n",))
    return [answer.strip() for answer in answers]


def _score(right: Sequence[bool]) -> dict[str, float]:
    """Return the share of correct answers with its 95 % bootstrap interval."""
    low, high = interval(right)
    return {"share": round(sum(right) / len(right), 4), "low": round(low, 4), "high": round(high, 4)}


def _by_count(truths: list[str], guesses: list[str]) -> dict[str, float]:
    """Return the share of exact captions by the number of digits of the image."""
    right = defaultdict(list)
    for truth, guess in zip(truths, guesses):
        right[str(len(truth.split()))].append(truth == guess)
    return {count: round(sum(hits) / len(hits), 4) for count, hits in sorted(right.items())}


def _draw(out: Path, metrics: list[dict], images: list[Image.Image], truths: list[str], guesses: list[str]) -> bool:
    """Draw loss.png and samples.png; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats a text token", yscale="log")
    figure.savefig(out / "loss.png", dpi=150)

    by_count: dict[int, list[int]] = defaultdict(list)
    for i, truth in enumerate(truths):
        by_count[len(truth.split())].append(i)
    shown = [i for count in sorted(by_count) for i in random.Random(count).sample(by_count[count], 4)]
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, i in zip(figure.subplots(6, 4).flat, shown):
        axes.imshow(images[i], interpolation="nearest")
        axes.set_title(guesses[i], fontsize=8, color="black" if guesses[i] == truths[i] else "red")
        axes.axis("off")
    figure.suptitle("unseen images and the model's captions (red: wrong)", fontsize=10)
    figure.savefig(out / "samples.png", dpi=110)
    return True


def _tell(out: Path, summary: dict[str, Any], pictures: bool) -> None:
    """Print the summary and the commands to try next."""
    print(f"\ntrained in {summary['train_seconds']:.0f} s at {summary['tokens_per_second']:.0f} tokens/s")
    print("exact captions of unseen images, by number of digits:")
    print("   ".join(f"{count}: {share:.1%}" for count, share in summary["exact_match"].items()))
    print(f"questions about unseen images answered correctly: {_shown(summary['questions'])}")
    print("unseen images written in a notation that only the shots of the prompt show, with 95 % intervals:")
    print("   ".join(f"{shots}: {_shown(score)}" for shots, score in summary["notations"].items()))
    files = "loss.png, samples.png, summary.json" if pictures else "summary.json (pictures need matplotlib)"
    print(f"\n{out}/ holds checkpoint/, metrics.jsonl, {files}. Try next:")
    command = f"  mm1 generate {out}/checkpoint --image photo.png"
    print(f"{command}\n{command} --prompt 'quiz\n<image>question: how many sevens? answer:'")
    print("  mm1 train your-run.toml      (docs/data.md shows the formats of data)")


def _shown(score: dict[str, float]) -> str:
    return f"{score['share']:.1%} ({score['low']:.1%} to {score['high']:.1%})"
