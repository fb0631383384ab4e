"""Begin a run: find its tokenizer, the context of its model, its data, and the weights that it starts from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm1.engine.data.identity import differences
from mm1.engine.data.streams import Streams, make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.data.tokenizer import vocabulary_size
from mm1.engine.models.spec import Model
from mm1.engine.run_config import Run, stored_model
from mm1.engine.train import checkpoint
from mm1.engine.train.parallel import World
from mm1.errors import UserError


class Start(NamedTuple):
    """Holds what a run begins with."""

    run: Run  # with the context of its model and the number of its streams
    newest: Path | None  # the checkpoint that it resumes
    state: dict[str, Any] | None  # state.json of that
    tokenizer: TextTokenizer
    streams: Streams
    other_data: bool  # the checkpoint was trained on other data, which the user accepts


def open_run(
    run: Run, folder: Path, resume: bool, accept_other_data: bool, world: World, warn: Callable[[str], Any]
) -> Start:
    """Find the checkpoint to resume and open the data. Raises UserError for whatever of them cannot be used."""
    if not run.data.sources:
        raise UserError("setting data.sources is empty: train a .toml file with [[data.sources]] of kind and paths")
    newest = checkpoint.newest_whole(folder, world, warn) if resume else None
    if not resume and world.on_first(lambda: checkpoint.latest(folder)) is not None:
        raise UserError(f"{folder} holds a run already: give another folder, or --resume to continue it")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TextTokenizer(_tokenizer_path(run, newest))
    if len(tokenizer) > run.model.vocabulary:
        raise UserError(
            f"setting model.decoder.vocabulary is {run.model.vocabulary}, but {tokenizer.path} has"
            f" {len(tokenizer)} tokens: set model.decoder.vocabulary = {vocabulary_size(len(tokenizer))}"
        )
    context = max(run.data.tokens, run.model.context or 0, _context_before(run, newest))
    run = replace(run, model=replace(run.model, context=context))
    state = checkpoint.read_json(newest, "state.json") if newest else None
    # Processes of a tensor group draw the same records, and one of them lists the bad ones.
    quarantine = folder / "quarantine" if world.rank % run.parallel.tensor == 0 else None
    streams = make_streams(
        run, tokenizer, quarantine, warn, world.data_rank, world.data_size,
        len(state["data"]["streams"]) if state else 0, state.get("identity") if state else None,
    )  # fmt: skip
    changed = []
    if state:
        unknown = ["the checkpoint does not say on which"]  # as one of an earlier version of mm1
        before = state.get("identity")
        changed = differences(before, streams.identity) if before else unknown
    if changed and not accept_other_data:
        raise UserError(
            f"{newest} was trained on other data than this run's: {'; '.join(changed)}; "
            "--accept-other-data continues all the same, from the stored position in the new data"
        )
    # Written down: whoever goes on with the run may have another number of processes.
    run = replace(run, data=replace(run.data, streams=streams.streams))
    return Start(run, newest, state, tokenizer, streams, bool(changed))


def load_initial_weights(
    model: Model, folder: Path, tokenizer: TextTokenizer, world: World, accept_other_tokenizer: bool
) -> None:
    """Load the weights of another run's checkpoint, or of one that `mm1 convert` made, into the model."""
    folder = checkpoint.newest_in(folder)
    world.together(lambda: checkpoint.check(folder, world.rank, world.size))
    theirs = folder / "tokenizer.json"
    if not accept_other_tokenizer and TextTokenizer(theirs).vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"{tokenizer.path} gives other token ids than {theirs}, with which the weights of train.init were "
            f"trained: set data.tokenizer to that file, or pass --accept-other-data"
        )
    checkpoint.read_into(folder, {name: p.detach() for name, p in model.named_parameters()})


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that train.dtype names."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _context_before(run: Run, newest: Path | None) -> int:
    """Return the context of the checkpoint that the run begins with or resumes, 0 if it has none."""
    folder = newest or (checkpoint.newest_in(Path(run.train.init)) if run.train.init else None)
    if folder is None or not (folder / "config.json").is_file():  # which is told where the weights are read
        return 0
    return stored_model(checkpoint.read_json(folder, "config.json")).context or 0


def _tokenizer_path(run: Run, newest: Path | None) -> Path:
    """Return the tokenizer of the settings, or if there is none the copy in the checkpoint that the run begins with.

    Raises UserError if there is neither.
    """
    path, begun_with = Path(run.data.tokenizer), newest or checkpoint.newest_in(Path(run.train.init))
    if path.is_file():
        return path
    if (newest or run.train.init) and (begun_with / "tokenizer.json").is_file():
        return begun_with / "tokenizer.json"
    how = "make one by `mm1 tokenizer tokenizer.json FILES`"
    raise UserError(f"setting data.tokenizer is {run.data.tokenizer!r}, expected a file: {how}")
