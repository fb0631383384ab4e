"""Hold the weights and the optimizer of a run on this process; store and restore them."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine.layers.layer import learned_vectors
from mm1.engine.layers.sharding import local_part, sharded_like
from mm1.engine.models.spec import Model
from mm1.engine.run_config import changes, stored_model
from mm1.engine.train import checkpoint
from mm1.engine.train.config import Train
from mm1.engine.train.copies import WeightCopies
from mm1.engine.train.optim import adamw, update
from mm1.engine.train.parallel import World
from mm1.errors import UserError


class TrainingState:
    """Hold a model and its optimizer.

    dtype: autocast's. local_parameters: this process's shard of each parameter by name, which the optimizer updates.
    copies: a context in which the model computes with copies of its weights in this dtype, if it is not sharded.
    """

    def __init__(self, model: Model, t: Train, peak: float, world: World, dtype: torch.dtype):
        self.model, self.world = model, world
        self.local_parameters: dict[str, nn.Parameter] = {
            name: p if local_part(p) is p else nn.Parameter(local_part(p.detach()))
            for name, p in model.named_parameters()
        }
        narrow = world.size == 1 and dtype != torch.float32
        self.copies = WeightCopies(model, dtype) if narrow else nullcontext()
        self.optimizer = adamw(self.local_parameters.items(), t, peak, learned_vectors(model))

    def local_gradients(self) -> list[Tensor]:
        """Return this process's shards of the gradients, in the optimizer's order."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.local_parameters[name].grad = local_part(parameter.grad)
        return [p.grad for p in self.local_parameters.values() if p.grad is not None]

    def update(self, rate: float, bad: Tensor) -> None:
        """Apply an optimizer step and free all gradients; see optim.update."""
        update(self.optimizer, rate, bad)
        self.model.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name and the optimizer's state by name/key, each sharded as its parameter is."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.detach()
            for key, value in self.optimizer.state[self.local_parameters[name]].items():
                tensors[f"{name}/{key}"] = sharded_like(parameter, value) if value.ndim else value
        return tensors

    def is_finite(self) -> bool:
        """Return whether all weights and moments are finite, on all processes."""
        norms = torch.stack(torch._foreach_norm([local_part(x) for x in self.tensors().values()]))
        return math.isfinite(self.world.sum(norms.double().sum()).item())

    def save(self, folder: Path, texts: dict[str, str]) -> None:
        """Write a checkpoint of a run with one process. Raises SaveError if the file system refuses."""
        optimizer = {name: x for name, x in self.tensors().items() if name not in self.local_parameters}
        weights = dict(self.model.state_dict())
        checkpoint.write(folder, {"model.safetensors": weights, "optimizer.safetensors": optimizer}, texts)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Restore weights, optimizer and random state of a verified checkpoint, and return its state.json.

        Raises UserError if the checkpoint holds a model of another kind or with other settings.
        """
        config = self.model.config
        saved = stored_model(checkpoint.read_json(folder, "config.json"))
        if type(saved) is not type(config):
            raise UserError(f"{folder} holds a model of kind {saved.kind}, expected this run's {config.kind}")
        if changed := changes(saved, config, "model"):
            each = "; ".join(f"{name} was {old!r}, this run has {new!r}" for name, (old, new) in changed.items())
            raise UserError(f"{folder} was saved with other model settings: {each}")
        checkpoint.read_into(folder, self.tensors())
        state = checkpoint.read_json(folder, "state.json")
        torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))
        return state
