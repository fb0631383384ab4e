"""Write and read checkpoints, which are either complete or do not exist.

A checkpoint is a folder: model.safetensors, config.json and the tokenizer.json of a model of texts are enough for
inference, optimizer.safetensors and state.json continue the training; a run with many processes stores its tensors in
shards/. The folder is written under another name, every file is flushed to the disk, the marker COMPLETE with each
file's SHA-256 is written last, and only then is the folder renamed. Loading verifies the marker and the sums, so that a
missing file or a flipped byte is one clear line.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.layers.sharding import copy_to_part
from mm1.engine.models.registry import model_class, named, on_meta
from mm1.engine.run_config import saw_conversations, stored_model
from mm1.engine.train.parallel import World
from mm1.errors import UserError

MARKER = "COMPLETE"
NAME = re.compile(r"step-\d{8,}")
SHARDS = "shards"  # folder of torch.distributed.checkpoint, in checkpoints of several processes


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or damaged."""


class SaveError(OSError):
    """A checkpoint could not be written, such as to a full disk; nothing of it remains."""


def write(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    """Write `tensors` (file name -> named tensors) and `texts` (file name -> content) as one checkpoint folder.

    Raises SaveError if the file system refuses.
    """
    partial = partial_folder(folder)
    try:
        begin(folder)
        for name, values in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, partial / name)
        _finish(partial, folder, texts, _sums(partial, partial.rglob("*")))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # frees a full disk
        if isinstance(error, OSError | SafetensorError):
            raise SaveError(f"{folder} was not written: {error}") from None
        raise


class Saving:
    """Write a checkpoint of several processes while the run continues.

    Each process writes, flushes and hashes its own shards in a thread. The first process then completes the folder and
    calls `after`. The outcome is the same on all processes, but reaches them at different moments, so that they must
    agree before they act on `done`.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, Tensor], texts: dict[str, str], world: World, after: Callable[[], None]
    ):
        import torch.distributed.checkpoint as dcp

        self.folder, self.texts, self.world, self.after = folder, texts, world, after
        self.outcome: Future[str | None] = Future()
        world.on_first(lambda: begin(folder))
        shards = partial_folder(folder) / SHARDS
        self.written = cast(Any, dcp.async_save(tensors, checkpoint_id=shards, process_group=cast(Any, world.savers)))
        Thread(target=self._work, name="checkpoint", daemon=True).start()

    @property
    def done(self) -> bool:
        """Return whether the save has ended, with success or not."""
        return self.outcome.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises SaveError on all processes if one of them failed."""
        if (reason := self.outcome.result()) is not None:
            raise SaveError(f"{self.folder} was not written: {reason}")

    def _work(self) -> None:
        try:
            self.outcome.set_result(self._write())
        except BaseException as error:  # the other processes ended
            self.outcome.set_exception(error)

    def _write(self) -> str | None:
        """Write the checkpoint; return the reason if that failed, or None."""
        partial, sums, reason = partial_folder(self.folder), {}, None
        try:
            self.written.result()
            shards = list((partial / SHARDS).glob(f"__{self.world.rank}_*"))
            sums = _sums(partial, [*shards, *[partial / SHARDS / ".metadata"] * self.world.first])
        except BaseException as error:  # torch's CheckpointException is no Exception
            reason = _reason(error)
        parts = self.world.gather((sums, reason), self.world.savers)
        if self.world.first:
            reason = next((reason for _, reason in parts if reason is not None), None)
            try:
                if reason is None:
                    _finish(partial, self.folder, self.texts, {n: s for sums, _ in parts for n, s in sums.items()})
                    self.after()
            except Exception as error:  # the other processes wait for the outcome
                reason = _reason(error)
            if reason is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return self.world.gather(reason, self.world.savers)[0]


def _reason(error: BaseException) -> str:
    """Return an error as one line; for torch's checkpoint errors, that of the first process that failed."""
    for cause, _ in getattr(error, "failures", {}).values():
        return _reason(cause)
    return " ".join(f"{type(error).__name__}: {error}".split())


def partial_folder(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written before it is renamed."""
    return folder.with_name(f".{folder.name}.partial")


def begin(folder: Path) -> None:
    """Create the empty folder in which a checkpoint is written."""
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    partial_folder(folder).mkdir(parents=True)


def _finish(partial: Path, folder: Path, texts: dict[str, str], sums: dict[str, str]) -> None:
    """Write the texts, then the marker with the sums of all files, and rename the folder."""
    for name, text in texts.items():
        (partial / name).write_text(text)
    sums = sums | _sums(partial, [partial / name for name in texts])
    (partial / MARKER).write_text(json.dumps(dict(sorted(sums.items())), indent=1))
    mode = (partial / MARKER).stat().st_mode  # follows the user's umask; safetensors writes files of mode 0600
    for name in sums:
        (partial / name).chmod(mode)
    for path in (partial / MARKER, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)
    if folder.exists():  # the run was resumed from an earlier checkpoint and repeated this step
        shutil.rmtree(folder)
    os.rename(partial, folder)
    _sync(folder.parent)


def load(
    path_or_name: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:  # the class that is registered for the model's kind
    """Return a model for inference: a checkpoint folder (or a run's), or a named size with random weights.

    device: default is the GPU, or the CPU of a machine without one. dtype: default is bf16 on a GPU, fp32 on a CPU. The
    checkpoint's tokenizer becomes `model.tokenizer`; `model.conversations` tells whether it was trained on
    conversations. Raises CheckpointError for a damaged checkpoint, UserError for an unknown name.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = Path(path_or_name)
    if not folder.exists():
        if len(folder.parts) > 1:
            raise CheckpointError(f"no checkpoint at {folder}")
        c = named(str(path_or_name))
        model = model_class(c.kind)(c).init_weights()
    else:
        folder = newest_in(folder)
        check(folder)
        c = stored_model(stored := read_json(folder, "config.json"))
        with torch.device("meta"):
            model = model_class(c.kind)(c)
        model.load_state_dict(weights(folder), assign=True)
        model.conversations = saw_conversations(stored)
        model.tokenizer = TextTokenizer(folder / "tokenizer.json") if c.vocabulary else None
    model.init_buffers("cpu")
    return model.to(device, dtype).eval()


def check(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError unless every file of the checkpoint exists as it was written.

    part, parts: verify only the files part, part + parts, …, so that processes can share the work.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}")
    try:
        sums = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        sums = {}
    if not isinstance(sums, dict) or "config.json" not in sums:
        raise CheckpointError(f"{folder} is not a complete checkpoint: no readable file {MARKER}")
    for name in sorted(sums)[part::parts]:
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        try:
            actual = _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name}: {error.strerror or error}") from None
        if actual != sums[name]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written (SHA-256 differs)")


def newest_in(path: Path) -> Path:
    """Return the checkpoint to which a run's folder links, or the path itself if it is not a run's folder."""
    return path / "checkpoint" if not (path / MARKER).is_file() and (path / "checkpoint").exists() else path


def numbered(run: Path) -> list[Path]:
    """Return the folders of a run that have a checkpoint's name, in the order of their steps."""
    folders = [path for path in run.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run's folder, or None."""
    return next((path for path in reversed(numbered(run)) if (path / MARKER).is_file()), None)


def newest_whole(run: Path, world: World, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint without damage, or None if the run has no checkpoint.

    Newer damaged ones are renamed to "damaged-…", with a warning each. All processes call this together and share the
    reading. Raises CheckpointError, without renaming any, if all checkpoints are damaged.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for folder in reversed(world.on_first(lambda: numbered(run))):
        try:
            world.together(lambda folder=folder: check(folder, world.rank, world.size))
        except CheckpointError as error:
            damaged.append((folder, error))
            continue
        for other, error in damaged:
            aside = world.on_first(lambda other=other: set_aside(other))
            warn(f"{error}; it is now {aside.name}")
        return folder
    if damaged:
        raise CheckpointError(f"{run} has no whole checkpoint; of the newest: {damaged[0][1]}")
    return None


def set_aside(folder: Path) -> Path:
    """Rename an unusable checkpoint, so that nothing reads or deletes it, and return its new path."""
    names = (f"damaged-{folder.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return folder.rename(next(path for name in names if not (path := folder.with_name(name)).exists()))


def point(link: Path, folder: Path) -> None:
    """Make `link` a symbolic link to its sibling `folder`, atomically."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and incomplete folders that killed runs left."""
    complete = [path for path in numbered(run) if (path / MARKER).is_file()]
    for path in complete[: -keep or None]:
        (path / MARKER).unlink()  # first, so that a kill in between leaves no damaged checkpoint with a marker
    unfinished = [path for path in run.glob(".step-*.partial") if NAME.fullmatch(path.name[1 : -len(".partial")])]
    for path in [*unfinished, *(path for path in numbered(run) if not (path / MARKER).is_file())]:
        shutil.rmtree(path)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of a checkpoint, on the CPU."""
    return load_file(folder / name)


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors, whole or sharded, from a checkpoint of one process or many, by their names.

    Raises CheckpointError for a missing tensor or another shape.
    """
    if (folder / SHARDS).is_dir():
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        dcp.load(cast(dict[str, Any], tensors), checkpoint_id=folder / SHARDS, no_dist=not dist.is_initialized())
        return
    files = (folder / file for file in ("model.safetensors", "optimizer.safetensors"))
    stored = {n: x for file in files if file.exists() for n, x in read_tensors(folder, file.name).items()}
    for name, tensor in tensors.items():
        if name not in stored or stored[name].shape != tensor.shape:
            actual = f"of shape {tuple(stored[name].shape)}" if name in stored else "missing"
            raise CheckpointError(f"{folder}: {name} is {actual}, expected {tuple(tensor.shape)}")
        copy_to_part(tensor, stored[name].to(tensor.device))


def weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of the model by name, on the CPU, from a checkpoint of one process or many."""
    if not (folder / SHARDS).is_dir():
        return read_tensors(folder, "model.safetensors")
    model = on_meta(stored_model(read_json(folder, "config.json")))
    tensors = {name: torch.empty_like(p, device="cpu") for name, p in model.state_dict().items()}
    read_into(folder, tensors)
    return tensors


def export(folder: Path, out: Path) -> None:
    """Write a checkpoint as one safetensors file with its config and tokenizer, for inference.

    Raises CheckpointError if the checkpoint is damaged or `out` exists.
    """
    folder = newest_in(folder)
    check(folder)
    if out.exists():
        raise CheckpointError(f"{out} exists already")
    files = (folder / name for name in ("config.json", "tokenizer.json"))
    texts = {file.name: file.read_text() for file in files if file.exists()}  # some models have no tokenizer
    write(out, {"model.safetensors": weights(folder)}, texts)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint."""
    return json.loads((folder / name).read_text())


def _sums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Flush files to the disk, and return their SHA-256 by their paths inside `folder`."""

    def flushed(path: Path) -> str:
        _sync(path)
        return _sha256(path)

    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(flushed, files)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
