"""Checkpoints: complete or not there.

A checkpoint is a folder: model.safetensors, config.json and tokenizer.json, which are all that inference needs, and
optimizer.safetensors and state.json to go on training; where a run has many processes, the tensors are in shards/. It
is written under another name, every file is flushed to the disk, the marker COMPLETE with each file's SHA-256 comes
last, and only then is the folder renamed. Loading checks the marker and the sums, so a missing file or a flipped byte
is one clear line.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm1.engine.config import named, stored_model
from mm1.engine.data.document import TextTokenizer
from mm1.engine.data.record import DataError
from mm1.engine.model import MM1
from mm1.engine.parallel import World, put

MARKER = "COMPLETE"
SHARDS = "shards"  # folder of torch.distributed.checkpoint, where a run had many processes


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete or damaged."""


def write(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    """Write `tensors` (file name -> named tensors) and `texts` (file name -> content) as one checkpoint folder."""
    partial = _begun(folder)
    try:
        for name, values in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, partial / name)
        _finish(partial, folder, texts)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
        raise


class Saving:
    """A checkpoint of many processes on its way to the disk: tensors were copied, and the run goes on meanwhile."""

    def __init__(self, written: Any, finish: Callable[[], None] | None, world: World):
        self.written, self.finish, self.world = written, finish, world

    def wait(self) -> None:
        """Until all of it is there, on all processes."""
        self.written.result()
        if self.finish is not None:
            self.finish()
        self.world.wait()


def write_sharded(
    folder: Path, tensors: dict[str, Tensor], texts: dict[str, str], world: World, after: Callable[[], None]
) -> Saving:
    """Begin to write what each process holds; `after` is called by the first when the checkpoint is complete."""
    import torch.distributed.checkpoint as dcp

    partial = _begun(folder) if world.first else folder.with_name(f".{folder.name}.partial")
    world.wait()

    def finish() -> None:
        _finish(partial, folder, texts)
        after()

    written = dcp.async_save(tensors, checkpoint_id=partial / SHARDS, process_group=cast(Any, world.savers))
    return Saving(written, finish if world.first else None, world)


def _begun(folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, folder: Path, texts: dict[str, str]) -> None:
    """Texts, sums and the marker; then it gets its name."""
    for name, text in texts.items():
        (partial / name).write_text(text)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        sums = dict(zip((str(path.relative_to(partial)) for path in paths), pool.map(_flushed_sum, paths)))
    (partial / MARKER).write_text(json.dumps(sums, indent=1))
    for path in (partial / MARKER, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)
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
        model = MM1(stored_model(read_json(folder, "config.json")))
    model.load_state_dict(weights(folder), assign=True)
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


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors, whole or parts, with what a checkpoint of one process or of many has under their names.

    Raises CheckpointError for one that is missing or of another shape.
    """
    if (folder / SHARDS).is_dir():
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        dcp.load(cast(dict[str, Any], tensors), checkpoint_id=folder / SHARDS, no_dist=not dist.is_initialized())
        return
    files = (folder / file for file in ("model.safetensors", "optimizer.safetensors"))
    found = {n: x for file in files if file.exists() for n, x in read_tensors(folder, file.name).items()}
    for name, tensor in tensors.items():
        if name not in found or found[name].shape != tensor.shape:
            has = f"of shape {tuple(found[name].shape)}" if name in found else "missing"
            raise CheckpointError(f"{folder}: {name} is {has}, expected {tuple(tensor.shape)}")
        put(tensor, found[name].to(tensor.device))


def weights(folder: Path) -> dict[str, Tensor]:
    """All of the model, of a checkpoint of one process or of many."""
    if not (folder / SHARDS).is_dir():
        return read_tensors(folder, "model.safetensors")
    with torch.device("meta"):
        model = MM1(stored_model(read_json(folder, "config.json")))
    found = {name: torch.empty_like(p, device="cpu") for name, p in model.state_dict().items()}
    read_into(folder, found)
    return found


def export(folder: Path, out: Path) -> None:
    """A checkpoint as one safetensors file with its config and tokenizer: all that inference needs."""
    if not (folder / MARKER).is_file() and (folder / "checkpoint").exists():
        folder = folder / "checkpoint"
    check(folder)
    if out.exists():
        raise CheckpointError(f"{out} exists already")
    texts = {name: (folder / name).read_text() for name in ("config.json", "tokenizer.json")}
    write(out, {"model.safetensors": weights(folder)}, texts)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _flushed_sum(path: Path) -> str:
    _sync(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
