"""Begin a run: find its tokenizer, the context of its model, its data, and its initial weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.engine.data.identity import differences
from mm1.engine.data.streams import Streams, make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.data.tokenizer import vocabulary_size
from mm1.engine.models.spec import Model
from mm1.engine.run_config import Run, stored_model
from mm1.engine.settings import hints
from mm1.engine.train import checkpoint
from mm1.engine.train.parallel import World
from mm1.errors import UserError


class Start(NamedTuple):
    """Hold the settings, checkpoint, tokenizer and data that a run begins with."""

    run: Run  # with the context of its model and the number of its streams
    newest: Path | None  # the checkpoint that it resumes
    state: dict[str, Any] | None  # state.json of this checkpoint
    tokenizer: TextTokenizer | None  # None for a model that takes images alone
    streams: Streams
    other_data: bool  # the checkpoint was trained on other data, and the user accepts it


def open_run(
    run: Run, folder: Path, resume: bool, accept_other_data: bool, world: World, warn: Callable[[str], Any]
) -> Start:
    """Find the checkpoint to resume and open the data. Raises UserError if one of them cannot be used."""
    if not run.data.sources:
        raise UserError("setting data.sources is empty: train a .toml file with [[data.sources]] of kind and paths")
    newest = checkpoint.newest_whole(folder, world, warn) if resume else None
    if not resume and world.on_first(lambda: checkpoint.latest(folder)) is not None:
        raise UserError(f"{folder} holds a run already: give another folder, or --resume to continue it")
    folder.mkdir(parents=True, exist_ok=True)
    origin = newest or (checkpoint.newest_in(Path(run.train.init)) if run.train.init else None)
    tokenizer = None
    if run.model.vocabulary:
        tokenizer = _tokenizer_of(run, origin)
        context = max(run.data.tokens, run.model.context or 0, _context_of(origin))
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
        saved = state.get("identity")  # earlier versions of mm1 did not store it
        changed = differences(saved, streams.identity) if saved else ["the checkpoint does not record on which"]
    if changed and not accept_other_data:
        raise UserError(
            f"{newest} was trained on other data than this run's: {'; '.join(changed)}; "
            "--accept-other-data continues anyway, from the stored position in the new data"
        )
    # Stored in the checkpoint, because a resumed run may have another number of processes.
    run = replace(run, data=replace(run.data, streams=streams.streams))
    return Start(run, newest, state, tokenizer, streams, bool(changed))


def load_initial_weights(
    model: Model, folder: Path, tokenizer: TextTokenizer | None, world: World, accept_other_tokenizer: bool
) -> None:
    """Load into the model the weights of another run's checkpoint, or of one that `mm1 convert` made.

    From a model of another kind, such as AIM's for an MM1, its image encoder is loaded, and the rest of the model keeps
    its random weights. Raises UserError for a damaged checkpoint, for an encoder with other settings, or if its
    tokenizer differs and accept_other_tokenizer is false.
    """
    folder = checkpoint.newest_in(folder)
    world.together(lambda: checkpoint.check(folder, world.rank, world.size))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    source = stored_model(checkpoint.read_json(folder, "config.json"))
    if source.kind != model.config.kind:
        checkpoint.read_into(folder, _encoder_weights(weights, model.config, source, folder))
        return
    theirs = folder / "tokenizer.json"
    if tokenizer and not accept_other_tokenizer and TextTokenizer(theirs).vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"{tokenizer.path} has other token ids than {theirs}, with which the weights of train.init were "
            f"trained: set data.tokenizer to that file, or pass --accept-other-data"
        )
    checkpoint.read_into(folder, weights)


def _encoder_weights(weights: dict[str, Tensor], config: Any, source: Any, folder: Path) -> dict[str, Tensor]:
    """Return those of a model's weights that a checkpoint of another kind of model has: the image encoder's.

    A final norm that only one of the two has is not copied. config, source: settings of the model and of the checkpoint
    in `folder`. Raises UserError if their encoders differ in a setting that the learned weights depend on.
    """
    ours, theirs = getattr(config, "vision", None), getattr(source, "vision", None)
    if ours is None or theirs is None:
        raise UserError(f"train.init {folder} is a model of kind {source.kind}, expected {config.kind}")
    free = {"final_norm", "interpolation"} | ({"table"} if ours.positions == "sincos" else set())
    if other := [
        f"{name} {getattr(theirs, name)}, not {getattr(ours, name)}"
        for name in hints(type(ours))
        if name not in free and getattr(theirs, name) != getattr(ours, name)
    ]:
        raise UserError(
            f"train.init {folder} has an image encoder with other settings model.vision: {'; '.join(other)}"
        )
    both = ours.final_norm and theirs.final_norm
    return {
        name: weight
        for name, weight in weights.items()
        if name.startswith("vision.") and (both or not name.startswith("vision.final_norm."))
    }


def named_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that train.dtype names; "auto" depends on the device."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _context_of(checkpoint_folder: Path | None) -> int:
    """Return the context of the checkpoint that the run begins with, 0 if it has none."""
    if checkpoint_folder is None or not (checkpoint_folder / "config.json").is_file():  # loading raises the error
        return 0
    return stored_model(checkpoint.read_json(checkpoint_folder, "config.json")).context or 0


def _tokenizer_of(run: Run, checkpoint_folder: Path | None) -> TextTokenizer:
    """Return the tokenizer of a run. Raises UserError without one, and for one with more tokens than the model."""
    tokenizer = TextTokenizer(_tokenizer_path(run.data.tokenizer, checkpoint_folder))
    if len(tokenizer) > run.model.vocabulary:
        raise UserError(
            f"the model's vocabulary is {run.model.vocabulary}, but {tokenizer.path} has {len(tokenizer)} tokens:"
            f" set the vocabulary, such as model.decoder.vocabulary, to {vocabulary_size(len(tokenizer))}"
        )
    return tokenizer


def _tokenizer_path(name: str, checkpoint_folder: Path | None) -> Path:
    """Return data.tokenizer, or the copy in the checkpoint that the run begins with. Raises UserError without both."""
    if Path(name).is_file():
        return Path(name)
    if checkpoint_folder and (checkpoint_folder / "tokenizer.json").is_file():
        return checkpoint_folder / "tokenizer.json"
    raise UserError(
        f"setting data.tokenizer is {name!r}, expected a file: make one by `mm1 tokenizer tokenizer.json FILES`"
    )
