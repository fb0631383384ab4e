"""The identity of a run's data: plain values that together determine the sequence of its documents.

Checkpoints store it, so that the names in it stay as they are. Files are identified by their names, sizes and numbers
of records, not by their folders and dates: data may be moved.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mm1.engine.data.document import Budget, TextTokenizer
from mm1.engine.data.record import SMALL_SOURCE

if TYPE_CHECKING:
    from mm1.engine.data.sources import Source
    from mm1.engine.run_config import Run


def identity(
    run: "Run", tokenizer: TextTokenizer, budget: Budget, buffer: int, streams: int, sources: "Sequence[Source]",
    mean_lengths: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Return the identity of a run's data, of its resolved settings, as plain values for JSON."""
    m = run.model.images
    values = {
        "train.seed": run.train.seed,
        "data.tokenizer": hashlib.sha256(tokenizer.text.encode()).hexdigest(),
        "data.tokens": budget.tokens,
        "data.images": budget.media,
        "data.patches": budget.patches,
        "data.documents": budget.documents,
        "data.buffer": buffer,
        "data.streams": streams,
        "model.vision.patch": m.patch,
        "model.image_mode": m.mode,
        "model.image_size": m.size,
        "model.image_patches": m.patches,
        "model.image_parts": m.parts,
        "model.connector.tokens": m.slots,
    }
    for i, (setting, source) in enumerate(zip(run.data.sources, sources)):
        values |= {
            f"data.sources[{i}].kind": setting.kind,
            f"data.sources[{i}].files": source.files,
            f"data.sources[{i}].weight": setting.weight,
            mean_length(i): mean_lengths[i],
        }
        if len(source) < SMALL_SOURCE:  # older versions shuffled these too by Grain's cipher, and stored no order
            values[f"data.sources[{i}].order"] = "sorted by a hash"
    return values


def mean_length(source: int) -> str:
    """Return the name under which an identity has a source's mean length in tokens, by which sources are mixed."""
    return f"data.sources[{source}].mean_length"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each value of an identity that differs from before.

    Mean lengths have no line of their own: they follow from files and tokenizer.
    """
    lines = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new or name.endswith(".mean_length"):
            continue
        if name.endswith(".files"):
            old, new = _different_files(old or [], new or [])
        lines.append(f"{name}: {_text_of(new)}, was {_text_of(old)}")
    return lines


def _different_files(before: list[list[Any]], now: list[list[Any]]) -> tuple[str, str]:
    """Describe the first two files that differ by their numbers of records, or by their bytes if only those differ."""
    at = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    old, new = (files[at] if at < len(files) else None for files in (before, now))
    by_bytes = old is not None and new is not None and (old[0], old[2]) == (new[0], new[2])

    def described(file: list[Any] | None, count: int) -> str:
        if file is None:
            return f"{count} files"
        name, size, records = file
        return f"{name} ({size} bytes)" if by_bytes else f"{name} ({records} records)"

    return described(old, len(before)), described(new, len(now))


def _text_of(value: Any) -> str:
    return "nothing" if value is None else str(value)
