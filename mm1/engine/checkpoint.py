"""Checkpoints: complete or not there.

A checkpoint is a folder: model.safetensors, config.json and tokenizer.json, which are all that inference needs, and
optimizer.safetensors and state.json to go on training. It is written under another name, every file is flushed to the
disk, the marker COMPLETE with each file's SHA-256 comes last, and only then is the folder renamed. Loading checks the
marker and the sums, so a missing file or a flipped byte is one clear line.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm1.engine.config import from_dict, named
from mm1.engine.data.document import TextTokenizer
from mm1.engine.data.record import DataError
from mm1.engine.model import MM1

MARKER = "COMPLETE"


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete or damaged."""


def write(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    """Write `tensors` (file name -> named tensors) and `texts` (file name -> content) as one checkpoint folder."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in tensors.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, partial / name)
    for name, text in texts.items():
        (partial / name).write_text(text)
    sums = {}
    for path in sorted(partial.iterdir()):
        _sync(path)
        sums[path.name] = _sha256(path)
    (partial / MARKER).write_text(json.dumps(sums, indent=1))
    _sync(partial / MARKER)
    _sync(partial)
    if folder.exists():  # a run that was resumed from before it writes it again
        shutil.rmtree(folder)
    os.rename(partial, folder)
    _sync(folder.parent)


def point(link: Path, folder: Path) -> None:
    """Make `link` a symbolic link to its sibling `folder`, atomically."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)


def load(
    path_or_name: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> MM1:
    """A model for inference: a checkpoint folder (or a run's), or a named size with random weights.

    device: the GPU if there is one. dtype: fp32 on a CPU, bf16 on a GPU. A checkpoint's tokenizer comes along as
    `model.tokenizer`. Raises CheckpointError for a damaged checkpoint, DataError for an unknown name.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = Path(path_or_name)
    if not folder.exists():
        if len(folder.parts) > 1:
            raise CheckpointError(f"no checkpoint at {folder}")
        return MM1(named(str(path_or_name))).initialize().to(device, dtype).eval()
    if not (folder / MARKER).is_file() and (folder / "checkpoint").exists():
        folder = folder / "checkpoint"
    check(folder)
    with torch.device("meta"):
        model = MM1(from_dict(read_json(folder, "config.json")).model)
    model.load_state_dict(read_tensors(folder, "model.safetensors"), assign=True)
    model.tokenizer = TextTokenizer(folder / "tokenizer.json")
    return model.to(device, dtype).eval()


def check(folder: Path) -> None:
    """CheckpointError unless every file of the checkpoint is there as it was written."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}")
    try:
        sums = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder} is not a complete checkpoint: no readable file {MARKER}") from None
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if _sha256(folder / name) != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written (SHA-256 differs)")


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder; unfinished ones are passed over."""
    found = [path for path in run.glob("step-*") if (path / MARKER).is_file()]
    return max(found, default=None)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and whatever a killed run left half-written."""
    for path in sorted(path for path in run.glob("step-*") if (path / MARKER).is_file())[: -keep or None]:
        (path / MARKER).unlink()  # first, so that a kill in between leaves no checkpoint that only looks whole
        shutil.rmtree(path)
    for path in run.glob("step-*"):
        if not (path / MARKER).is_file():
            shutil.rmtree(path)
    for path in run.glob(".step-*.partial"):
        shutil.rmtree(path)


def read_tensors(folder: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return load_file(folder / name, device=str(device))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
