"""Define the identity of a run's data: plain values that together determine the sequence of its documents.

Checkpoints store it, therefore its names do not change. Files are identified by their names, sizes and numbers of
records, not by their folders and dates: data may be moved.
"""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from mm1.engine.data.document import Budget
from mm1.engine.data.record import SMALL_SOURCE
from mm1.engine.data.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from mm1.engine.data.sources import Source
    from mm1.engine.run_config import Run

IMAGE_NAMES = (  # names of the first fields of ImageInput
    "model.vision.patch", "model.image_mode", "model.image_size", "model.image_patches", "model.image_parts",
    "model.connector.tokens",
)  # fmt: skip


def identity(
    run: "Run", tokenizer: TextTokenizer | None, budget: Budget, buffer: int, streams: int, sources: "Sequence[Source]",
    mean_lengths: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Return the identity of a run's data with its resolved settings, as plain values for JSON.

    tokenizer: None for a model that takes images alone.
    """
    values = {
        "train.seed": run.train.seed,
        **({} if tokenizer is None else {"data.tokenizer": hashlib.sha256(tokenizer.text.encode()).hexdigest()}),
        "data.tokens": budget.tokens,
        "data.images": budget.media,
        "data.patches": budget.patches,
        "data.documents": budget.documents,
        "data.buffer": buffer,
        "data.streams": streams,
        **dict(zip(IMAGE_NAMES, run.model.images)),
    }
    if draws := run.model.images.draws:
        values |= {"model.image_crop": list(draws.crop), "model.image_flip": draws.flip, "model.prefix": draws.prefix}
        values |= {"model.image_min_patches": draws.area[0] if draws.area else 0, "target_rows": budget.target_rows}
    for i, (setting, source) in enumerate(zip(run.data.sources, sources)):
        values |= {
            f"data.sources[{i}].kind": setting.kind,
            f"data.sources[{i}].files": source.files,
            f"data.sources[{i}].weight": setting.weight,
            mean_length(i): mean_lengths[i],
        }
        if len(source) < SMALL_SOURCE:  # older versions shuffled these by Grain's cipher too, and stored no order
            values[f"data.sources[{i}].order"] = "sorted by a hash"
    return values


def mean_length(source: int) -> str:
    """Return the name in an identity of a source's mean length in tokens, by which sources are mixed."""
    return f"data.sources[{source}].mean_length"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each value of the identity `now` that differs from `before`.

    Mean lengths have no line, because they follow from files and tokenizer.
    """
    lines = []
    for name in now | before:
        old, new = before.get(name), now.get(name)
        if old == new or name.endswith(".mean_length"):
            continue
        if name.endswith(".files"):
            old, new = _different_files(old or [], new or [])
        old, new = ("nothing" if value is None else value for value in (old, new))
        lines.append(f"{name}: {new}, was {old}")
    return lines


def _different_files(before: list[list[Any]], now: list[list[Any]]) -> tuple[str, str]:
    """Describe the first two files that differ, by their numbers of records, or by their bytes if only those differ."""
    old, new = next((a, b) for a, b in zip_longest(before, now) if a != b)
    by_bytes = old and new and (old[0], old[2]) == (new[0], new[2])

    def describe(file: list[Any] | None, count: int) -> str:
        if file is None:
            return f"{count} files"
        name, size, records = file
        return f"{name} ({size} bytes)" if by_bytes else f"{name} ({records} records)"

    return describe(old, len(before)), describe(new, len(now))
