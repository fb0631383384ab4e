"""Read the sizes and final losses of runs and CSV files for a scaling law, and draw the law."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mm1.engine.data.lines import read_lines
from mm1.engine.evaluation.scaling import CONSTANTS, LETTERS, SYMBOLS, Fit, Points
from mm1.engine.models.registry import on_meta
from mm1.engine.run_config import stored_model
from mm1.engine.train import checkpoint
from mm1.errors import UserError, require

FINAL = 0.05  # share of a run's last steps, over which the loss is averaged


def read_points(paths: Sequence[Path], metric: str = "loss", part: str | None = None) -> Points:
    """Return the points of folders of runs and CSV files. Samples are None unless every point has them.

    metric: the loss in the lines of metrics.jsonl; part: count the parameters of this part of the models alone. Raises
    UserError for a path that is neither, an unfinished run and a CSV file without numbers.
    """
    rows = [
        row for path in paths for row in (_of_csv(path) if path.suffix == ".csv" else [_of_run(path, metric, part)])
    ]
    parameters, samples, losses = zip(*rows) if rows else ((), (), ())
    known = None if None in samples else np.array(samples, np.float64)
    return Points(np.array(parameters, np.float64), known, np.array(losses, np.float64))


def _of_csv(path: Path) -> list[tuple[float, float | None, float]]:
    """Return parameters, samples if there is such a column, and loss of each row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            names = table.fieldnames or []
            for name in ("parameters", "loss"):
                require(name in names, f"{path}: header", list(names), "parameters, loss and, if known, samples")
            return [
                (_number(path, row, "parameters"), _number(path, row, "samples") if "samples" in names else None,
                 _number(path, row, "loss"))
                for row in table
            ]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _number(path: Path, row: dict[str, str | None], name: str) -> float:
    try:
        return float(row[name] or "")
    except ValueError:
        raise UserError(f"{path}: {name} is {row[name]!r}, expected a number") from None


def _of_run(folder: Path, metric: str, part: str | None) -> tuple[float, float, float]:
    """Return a run's parameters, its targets seen, and the mean of the metric over its last steps.

    Parameters are counted without the rows of the vocabulary, as Kaplan et al. 2020 do.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is neither a .csv file nor the folder of a run: it has no metrics.jsonl")
    try:
        config = checkpoint.read_json(checkpoint.newest_in(folder), "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no checkpoint with settings: {error}") from None
    lines = [line for line in read_lines(folder / "metrics.jsonl")[0] if "targets" in line]  # a bad step has none
    steps, last = config["train"]["steps"], lines[-1]["step"] if lines else 0
    if last < steps:
        raise UserError(f"{folder} is at step {last} of {steps}: its final loss is not known yet")
    losses = {line["step"]: line[metric] for line in lines if line.get(metric) is not None}
    names = ", ".join(name for name, value in lines[-1].items() if isinstance(value, float))
    require(bool(losses), "metric", metric, f"one of {folder}: {names}")
    final = [loss for step, loss in losses.items() if step > steps * (1 - FINAL)] or [losses[max(losses)]]
    settings = stored_model(config)
    model = on_meta(settings)
    if part is not None:
        parts = dict(model.named_children())
        require(part in parts, "part", part, f"one of {', '.join(parts)}")
        model = parts[part]
    parameters = sum(p.numel() for p in model.parameters() if p.shape[:1] != (settings.vocabulary,))
    return parameters, float(np.mean([line["targets"] for line in lines])) * steps, float(np.mean(final))


def place(text: str) -> dict[str, float]:
    """Return the variables of "N=13e9" or "N=13e9,D=2e12" by their names. Raises UserError for another text."""
    names = {letter: name for name, letter in LETTERS.items()}
    pairs = [item.split("=", 1) for item in text.split(",")]
    try:
        values = {names[letter.strip()]: float(value) for letter, value in pairs}
    except (KeyError, ValueError):
        values = {}
    require(bool(values) and all(0 < x < np.inf for x in values.values()), "predict", text, "N=13e9 or N=13e9,D=2e12")
    return values


def draw(points: Points, one: Fit, many: Fit, file: Path) -> None:
    """Draw each variable's term, a straight line with its 95 % band, and the points without the other terms.

    Raises UserError without matplotlib and for a type of file that it does not write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts need matplotlib: pip install matplotlib") from None
    variables = {name: getattr(points, name) for name in one.law.variables}
    figure = Figure(figsize=(5 * len(variables), 4), layout="constrained")
    others = one.terms(**variables)[0]
    panels = figure.subplots(1, len(variables), squeeze=False)[0]
    for i, (axes, (name, values)) in enumerate(zip(panels, variables.items())):
        rest = others.sum(0) - others[i]
        line = {other: np.geomspace(x.min(), x.max(), 50) for other, x in variables.items()}
        low, high = np.quantile(many.terms(**line)[:, i], [0.025, 0.975], axis=0)
        axes.fill_between(line[name], low, high, color="#12708e", alpha=0.2, linewidth=0)
        axes.plot(line[name], one.terms(**line)[0, i], color="#12708e")
        axes.plot(values, points.loss - rest, "o", color="#1d2329", markersize=4)
        subtracted = ["E"] * one.law.has_floor + [SYMBOLS[other] for other in variables if other != name]
        exponent = one.values()[0, 2 * i + 1]
        axes.set(
            xscale="log", yscale="log", xlabel=f"{LETTERS[name]}, {name}", ylabel=" - ".join(["loss", *subtracted]),
            title=f"{SYMBOLS[CONSTANTS[name][1]]} = {exponent:.3g}",
        )  # fmt: skip
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
