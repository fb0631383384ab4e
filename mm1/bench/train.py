"""The training step, eager against compiled: same process, rounds interleaved, medians and their ratio."""

import dataclasses
import statistics
import time
from typing import Any

import torch

from mm1.engine.config import DIGITS_RUN, named
from mm1.engine.data.document import TextTokenizer
from mm1.engine.data.record import DataError
from mm1.engine.model import MM1
from mm1.engine.optim import adamw
from mm1.engine.train import make_loader


def measure(size: str, rounds: int, batches: int = 8) -> dict[str, Any]:
    """Seconds a step on the demo's data: forward, backward, clipping, AdamW; compile time apart."""
    if rounds < 1:
        raise DataError(f"rounds is {rounds}, expected at least 1")
    run = dataclasses.replace(DIGITS_RUN, model=named(size))
    tokenizer = TextTokenizer(run.data.tokenizer)
    loader = make_loader(run, tokenizer, None)
    packed = [next(loader) for _ in range(batches)]
    tokens = sum(batch.used_tokens for batch in packed) / batches

    steps = {"eager": _stepper(run, compile=False), "compiled": _stepper(run, compile=True)}
    warm = {}
    for name, step in steps.items():
        begin = time.perf_counter()
        step(packed[0])
        step(packed[1 % batches])
        warm[name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds):
        for name in list(steps)[:: 1 if r % 2 else -1]:
            for batch in packed:
                begin = time.perf_counter()
                steps[name](batch)
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{size}: training step, {tokens:.0f} tokens, median of {rounds * batches}, {torch.get_num_threads()} threads"
    )
    for name, median in medians.items():
        low, high = statistics.quantiles(seconds[name], n=10)[::8]
        spread = f"{1e3 * low:.0f} … {1e3 * high:.0f}"
        print(
            f"  {name:9} {1e3 * median:7.1f} ms  ({spread})  {tokens / median:8.0f} tok/s  first two {warm[name]:.1f} s"
        )
    print(f"  compiled is {medians['eager'] / medians['compiled']:.2f} × as fast")
    return {
        "bench": "train",
        "size": size,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": medians,
        "warm_up_seconds": warm,
        "ratio": medians["eager"] / medians["compiled"],
    }


def _stepper(run, *, compile: bool):
    model = MM1(run.model).initialize()
    optimizer = adamw(model, run.train, run.train.peak_lr or 1e-3)
    if compile:
        model.compile_blocks()

    def step(batch) -> None:
        (model.objective(model(batch), batch.target_count) / batch.target_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
