"""Write the report of `mm1 demo aim`: one HTML file with its table, charts and pictures, which needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm1.engine.demo.next_patches import completed, reconstructed
from mm1.engine.models.aim import AIM

SHOWN = 8  # drawings in each row of pictures
ZOOM = 3
WIDTH, HEIGHT, MARGIN = 560, 200, 40  # of a chart, in pixels
COLOURS = ("#707b84", "#12708e")
ROWS = {"pixels": "PCA of the pixels", "untrained": "encoder, before training", "trained": "encoder, after training"}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mm1 demo aim</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding: 0 1rem 0 0; text-align: left }} img, svg {{ max-width: 100%; image-rendering: pixelated }}
text {{ font-size: 12px }}
</style>
<h1>An image encoder that learned from pictures alone</h1>
<p>It saw clip art without captions or classes for {seconds:.0f} seconds, and learned to predict the pixels of the next
patch. All below are drawings that it has not seen.</p>
<h2>What the features are worth</h2>
<p>{images} drawings of {classes} classes, recognised from frozen features: by the nearest training drawings, and by an
attentive probe (for PCA, a linear one). In brackets are 95 % intervals.</p>
<table><tr><th>features<th>nearest neighbours<th>probe</tr>{scores}</table>
<h2>Next patches</h2>
<p>Above the drawings, below each patch as predicted from the true patches before it, row by row. AIM predicts
normalised pixels: mean and contrast of each patch are those of the true one.</p>
{patches}
<h2>Completions</h2>
<p>Above is what the encoder saw, in the middle how it went on from its own predictions, below the drawing. Mean and
contrast of each patch are again those of the true one.</p>
{completions}
<h2>Loss by position</h2>
<p>Mean squared error of normalised pixels by the patch's place, row by row, on unseen drawings. Predicting the mean of
each patch has a loss of 1, and 0 where a patch is of one colour.</p>
{by_position}
<h2>Loss in training</h2>
{training}
</html>
"""


def write_page(
    file: Path, summary: Mapping[str, Any], curve: Sequence[tuple[float, float]],
    by_position: Mapping[str, Sequence[float]], model: AIM, images: Tensor,
) -> None:  # fmt: skip
    """Write the report. curve: step and loss; by_position: losses by name; images: unseen ones, uint8 [N, H, W, 3]."""
    shown = images[:: max(len(images) // SHOWN, 1)][:SHOWN]
    side, half = model.config.vision.patch, shown.shape[1] // model.config.vision.patch // 2
    columns = shown.shape[2] // side
    seen = shown.clone()
    seen[:, half * side :] = 255
    positions = {name: list(enumerate(values, 1)) for name, values in by_position.items()}
    text = PAGE.format(
        seconds=summary["train_seconds"], images=summary["test_images"], classes=summary["classes"],
        scores="".join(_row(ROWS[name], scores) for name, scores in summary["accuracy"].items()),
        patches=_pictures(shown, reconstructed(model, shown)),
        completions=_pictures(seen, completed(model, shown, half * columns), shown),
        by_position=chart(positions, "patch"), training=chart({"trained": curve}, "step"),
    )  # fmt: skip
    file.write_text(text, encoding="utf-8")


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """Return lines of points as SVG, from 0 up. label: of the horizontal axis."""
    points = [point for line in lines.values() for point in line]
    right, top = (max(values) for values in zip(*points))
    x_of = lambda x: MARGIN + (WIDTH - 2 * MARGIN) * x / right  # noqa: E731
    y_of = lambda y: HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * y / top  # noqa: E731
    parts = [
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#aaa"/>',
        f'<text x="2" y="{MARGIN}">{top:.2f}</text><text x="2" y="{HEIGHT - MARGIN}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 16}" text-anchor="end">{label} {right:g}</text>',
    ]
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i + len(COLOURS) - len(lines)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{MARGIN + 100 * i}" y="20" fill="{colour}">{name}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(parts)}</svg>'


def _row(name: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    cells = (f"{s['share']:.1%} ({s['low']:.1%} to {s['high']:.1%})" for s in (scores["knn"], scores["attentive"]))
    return f"<tr><td>{name}<td>{'<td>'.join(cells)}</tr>"


def _pictures(*rows: Tensor) -> str:
    """Return rows of images uint8 [N, H, W, 3], one row below the other, as an element of HTML."""
    framed = [torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1), value=200) for x in rows]
    grid = torch.cat([torch.cat([*x], dim=1) for x in framed])
    image, file = Image.fromarray(grid.cpu().numpy()), io.BytesIO()
    image.resize((ZOOM * image.width, ZOOM * image.height), Image.Resampling.NEAREST).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
