"""Training: one step is visible in `_step`, everything that must survive is in `_state`."""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from mm1.engine import checkpoint
from mm1.engine.config import Run, from_dict, peak_lr, to_dict
from mm1.engine.data.document import Budget, DocumentEncoder, TextTokenizer
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import Loader
from mm1.engine.data.record import DataError
from mm1.engine.data.sources import open_source
from mm1.engine.display import Display
from mm1.engine.model import MM1, parameter_counts
from mm1.engine.optim import adamw, learning_rate


def train(run: Run, folder: Path, *, resume: bool = False, display: Display | None = None) -> MM1:
    """Train to run.train.steps, writing checkpoints and metrics.jsonl into `folder`; returns the model.

    resume continues bit-exactly from the newest complete checkpoint (same machine, same number of threads), or starts
    if there is none. SIGTERM and Ctrl-C save before they stop.
    """
    trainer = Trainer(run, folder, display or Display(folder, run.train), resume)
    trainer.fit()
    return trainer.model


class Trainer:
    def __init__(self, run: Run, folder: Path, display: Display, resume: bool):
        t = run.train
        self.run, self.folder, self.display = run, folder, display
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = _dtype(t.dtype, self.device)
        newest = checkpoint.latest(folder) if resume else None
        if not resume and checkpoint.latest(folder) is not None:
            raise DataError(f"{folder} holds a run already: give another folder, or --resume to continue it")
        folder.mkdir(parents=True, exist_ok=True)
        if not run.data.sources:
            raise DataError("no data is given: name a .toml file with [[data.sources]] of kind and paths")
        self.tokenizer = TextTokenizer(run.data.tokenizer)
        if len(self.tokenizer) > run.model.decoder.vocabulary:
            raise DataError(
                f"{run.data.tokenizer} has {len(self.tokenizer)} tokens, the model {run.model.decoder.vocabulary}"
            )
        self.loader = make_loader(run, self.tokenizer, folder / "quarantine.jsonl", display.warn)
        torch.manual_seed(t.seed)
        self.model = MM1(run.model).initialize(t.seed).to(self.device)
        self.peak = t.peak_lr or peak_lr(_law_parameters(run))
        self.optimizer = adamw(self.model, t, self.peak)
        self.step = 0
        if newest is not None:
            self._restore(newest)
        # Drop what a run wrote after the checkpoint it is resumed from; damage (position -1) is listed anew.
        _keep_lines(folder / "metrics.jsonl", lambda line: line["step"] <= self.step)
        _keep_lines(folder / "quarantine.jsonl", lambda line: 0 <= line["position"] < self.loader.position)
        if t.checkpoint_activations:
            _recompute_blocks(self.model)
        if t.compile:
            self.model.compile_blocks()

    def fit(self) -> None:
        t = self.run.train
        stop = _Stop()
        with stop, self.display.run(self.step):
            while self.step < t.steps and not stop.asked:
                metrics = self._step()
                self.step += 1
                self.display.step(self.step, metrics)
                if self.step % t.save_every == 0 or self.step == t.steps or stop.asked:
                    self.save()
        if stop.asked:
            raise KeyboardInterrupt

    def _step(self) -> dict[str, Any]:
        t, model = self.run.train, self.model
        begin, waited = time.perf_counter(), 0.0
        tokens = targets = images = 0
        sums = torch.zeros(3, device=self.device)  # nll, load balance, z
        key = ""
        for _ in range(t.accumulate):
            asked = time.perf_counter()
            batch = next(self.loader)
            waited += time.perf_counter() - asked
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses = model(batch.to(self.device))
                objective = model.objective(losses, batch.target_count)
            objective.backward()
            sums += torch.stack(losses).detach()
            tokens, targets = tokens + batch.used_tokens, targets + batch.target_count
            images, key = images + len(batch.grids.sizes or ()), batch.keys[0]
        # Gradients were summed over target tokens: the mean is that of the whole step, whatever each batch held.
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / max(targets, 1))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        nll, balance, z, grad_norm = (*sums.tolist(), norm.item())  # the step's one synchronisation
        if not math.isfinite(nll + grad_norm):
            raise FloatingPointError(f"loss {nll}, gradient norm {grad_norm} at step {self.step + 1}, {key}")
        rate = learning_rate(self.step, t, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": nll / max(targets, 1),
            "load_balance": balance / t.accumulate,
            "z_loss": z / t.accumulate,
            "grad_norm": grad_norm,
            "lr": rate,
            "tokens": tokens,
            "targets": targets,
            "images": images,
            "fill": tokens / (self.loader.budget.tokens * t.accumulate),
            "skipped": self.loader.skipped,
            "data_seconds": waited,
            "seconds": time.perf_counter() - begin,
        }

    def save(self) -> None:
        folder = self.folder / f"step-{self.step:08d}"
        tensors = {"model.safetensors": _weights(self.model), "optimizer.safetensors": self._optimizer_tensors()}
        texts = {
            "config.json": json.dumps(to_dict(self.run), indent=1),
            "tokenizer.json": Path(self.run.data.tokenizer).read_text(),
            "state.json": json.dumps(self._state()),
        }
        checkpoint.write(folder, tensors, texts)
        checkpoint.point(self.folder / "checkpoint", folder)
        checkpoint.prune(self.folder, self.run.train.keep)

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "data": self.loader.state(), "rng": torch.get_rng_state().tolist()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def _restore(self, folder: Path) -> None:
        checkpoint.check(folder)
        before = from_dict(checkpoint.read_json(folder, "config.json"))
        if before.model != self.run.model:
            raise DataError(f"{folder} holds another model than this run's; resume with the settings it began with")
        self.model.load_state_dict(checkpoint.read_tensors(folder, "model.safetensors", self.device))
        tensors = checkpoint.read_tensors(folder, "optimizer.safetensors", self.device)
        for name, parameter in self.model.named_parameters():
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = state
        state = checkpoint.read_json(folder, "state.json")
        self.step = state["step"]
        self.loader.restore(state["data"])
        torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))


def make_loader(
    run: Run, tokenizer: TextTokenizer, quarantine: Path | None, warn: Callable[[str], None] = print
) -> Loader:
    """Packed batches of the run's sources. Raises DataError for whatever is wrong with them."""
    d, m = run.data, run.model
    policy = ImagePolicy(patch=m.vision.patch, mode=m.image_mode, size=m.image_size, max_patches=m.image_patches)
    budget = Budget(
        tokens=d.tokens,
        images=d.images,
        patches=d.patches or d.images * policy.longest,
        documents=d.documents or max(1, d.tokens // 16),
        longest=policy.longest,
    )
    if budget.tokens < m.connector.tokens + 2:
        raise DataError(f"setting data.tokens is {d.tokens}, too few for one image of {m.connector.tokens} tokens")
    encode = DocumentEncoder(tokenizer, policy, m.connector.tokens, budget)
    sources = [open_source(source.kind, source.paths, Path.cwd()) for source in d.sources]
    for source in sources:
        for shard, reason in source.damage:
            warn(f"{shard}: {reason}")
    mixture = Mixture(sources, [source.weight for source in d.sources], encode, run.train.seed)
    return Loader(
        mixture, budget, image_id=tokenizer.image, patch=m.vision.patch, slots=m.connector.tokens, buffer=d.buffer,
        workers=d.workers, max_bad=d.max_bad, quarantine=quarantine,
        damage=[found for source in sources for found in source.damage],
    )  # fmt: skip


class _Stop:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop after the step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _law_parameters(run: Run) -> int:
    """N of the learning-rate law: the dense decoder without embeddings, also for a mixture (paper, section 3.4)."""
    counts = parameter_counts(run.model)
    return counts.get("decoder_dense_non_embedding", counts["decoder_non_embedding"])


def _recompute_blocks(model: MM1) -> None:
    """Keep only each block's input, and run the block again in backward."""
    for block in [*model.vision.blocks, *model.decoder.blocks]:
        inner = block.forward
        block.forward = lambda *args, inner=inner: recompute(inner, *args, use_reentrant=False)


def _weights(model: MM1) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop all other lines of a JSON-lines file; a kill may have cut the last one short."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and keep(json.loads(line))]
        path.write_text("".join(f"{line}\n" for line in lines))
