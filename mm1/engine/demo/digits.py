"""`mm1 demo`: train a small MM1 on the shipped handwritten digits, then look at what it says about unseen ones."""

import gzip
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mm1.engine.data.images import decode
from mm1.engine.data.lines import read_lines
from mm1.engine.data.record import Media
from mm1.engine.data.references import read_image
from mm1.engine.data.sources import open_source
from mm1.engine.infer.generate import generate
from mm1.engine.infer.prompts import Prompt
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import DIGITS_FOLDER, DIGITS_RUN
from mm1.engine.train import checkpoint
from mm1.engine.train.trainer import train
from mm1.errors import UserError

SHOTS = (0, 4, 8)


def demo(out: Path) -> dict[str, Any]:
    """Train into `out` (or continue, or reuse what is there), evaluate, write loss.png, samples.png, summary.json."""
    run = DIGITS_RUN
    if _is_trained(out, run.train.steps):
        print(f"{out} is trained already; delete it to train again")
    else:
        try:
            train(run, out, resume=True)
        except UserError as error:
            raise UserError(f"{error} (delete {out} to train the demo anew)") from None
    model = checkpoint.load(out)
    metrics = [line for line in read_lines(out / "metrics.jsonl")[0] if "seconds" in line]  # not of steps left out
    seconds = sum(m["seconds"] for m in metrics)
    begin = time.perf_counter()
    images, truths, guesses = captions(model)
    summary = {
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(sum(m["tokens"] for m in metrics) / seconds, 1),
        "exact_match": _by_count(truths, guesses),
        "question_answering": {f"{shots}-shot": questions(model, shots) for shots in SHOTS},
        "evaluate_seconds": round(time.perf_counter() - begin, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    pictures = _draw(out, metrics, images, truths, guesses)
    _tell(out, summary, pictures)
    return summary


def _is_trained(out: Path, steps: int) -> bool:
    """Whether the newest checkpoint is whole and that of the last step."""
    newest = checkpoint.latest(out)
    if newest is None:
        return False
    try:
        checkpoint.check(newest)
    except checkpoint.CheckpointError:
        return False
    return checkpoint.read_json(newest, "state.json")["step"] >= steps


def captions(model: MM1) -> tuple[list[Image.Image], list[str], list[str]]:
    """Unseen images, their captions, and the model's."""
    source = open_source("captions", str(DIGITS_FOLDER / "test-captions.tar.gz"), Path())
    pairs = [source[i].parts for i in range(len(source))]
    images = [decode(image.data) for image, _ in pairs if isinstance(image, Media)]
    truths = [str(text) for _, text in pairs]
    return images, truths, _answer(model, [[image] for image in images])


def questions(model: MM1, shots: int, seed: int = 0) -> float:
    """Share of questions about unseen images answered right, after `shots` examples drawn from the training images."""
    items, examples = (
        _items(DIGITS_FOLDER / name) for name in ("test-interleaved.jsonl.gz", "train-questions.jsonl.gz")
    )
    draw = random.Random(seed)
    prompts: list[Prompt] = []
    for image, question, _ in items:
        parts: list[str | Image.Image] = ["quiz\n"]
        for example, asked, answer in draw.sample(examples, shots):
            parts += [example, f"question: {asked} answer: {answer}\n"]
        prompts.append([*parts, image, f"question: {question} answer:"])
    answers = _answer(model, prompts)
    return round(sum(a == answer for a, (_, _, answer) in zip(answers, items)) / len(items), 4)


def _items(path: Path) -> list[tuple[Image.Image, str, str]]:
    with gzip.open(path, "rt") as file:
        items = [json.loads(line) for line in file]
    return [(decode(read_image(item["image"], path.parent)), item["question"], item["answer"]) for item in items]


def _answer(model: MM1, prompts: Sequence[Prompt], at_once: int = 128) -> list[str]:
    answers: list[str] = []
    for first in range(0, len(prompts), at_once):
        answers += generate(model, prompts[first : first + at_once], max_tokens=12, stop=("\n",))
    return [answer.strip() for answer in answers]


def _by_count(truths: list[str], guesses: list[str]) -> dict[str, float]:
    right = defaultdict(list)
    for truth, guess in zip(truths, guesses):
        right[str(len(truth.split()))].append(truth == guess)
    return {count: round(sum(hits) / len(hits), 4) for count, hits in sorted(right.items())}


def _draw(out: Path, metrics: list[dict], images: list[Image.Image], truths: list[str], guesses: list[str]) -> bool:
    """loss.png and samples.png; False without matplotlib."""
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
    print(f"\ntrained in {summary['train_seconds']:.0f} s at {summary['tokens_per_second']:.0f} tokens/s")
    print("exact captions of unseen images, by number of digits:")
    print("   ".join(f"{count}: {share:.1%}" for count, share in summary["exact_match"].items()))
    print("questions about unseen images answered right:")
    print("   ".join(f"{shots}: {share:.1%}" for shots, share in summary["question_answering"].items()))
    files = "loss.png, samples.png, summary.json" if pictures else "summary.json (pictures need mm1-engine[report])"
    print(f"\n{out}/ holds checkpoint/, metrics.jsonl, {files}. Try next:")
    print(f"  mm1 generate {out}/checkpoint --image photo.png")
    print(
        f"  mm1 generate {out}/checkpoint --image photo.png --prompt 'quiz\n<image>question: how many sevens? answer:'"
    )
    print("  mm1 train your-run.toml      (the README shows the three formats)")
