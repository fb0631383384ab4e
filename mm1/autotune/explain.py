"""Explain which configuration a kernel gets, and why, for `mm1 explain`."""

from typing import Any

from mm1.autotune.space import DTYPES, chosen, shape_named, short
from mm1.autotune.timing import device_named
from mm1.kernels.tuning import chain


def explain(kernel: str, shape: str, device: str | None, bits: int = 16) -> dict[str, Any]:
    """Print which step of the look-up has an answer, and why earlier steps have none; return the answer."""
    tunable = chosen([kernel])[0]
    target, at = device_named(device), shape_named(tunable, shape)
    print(f"{kernel}  {short(at)}  {bits} bits  {target.name} ({target.arch}, {target.units} units)")
    steps = list(chain(tunable, at, DTYPES[bits], target))
    answer = next(step for step in steps if step.config is not None)
    for step in steps:
        print(f"{'→' if step is answer else ' '} {step.step:10} {step.why}")
    print(short(answer.config))
    seconds = tunable.seconds(answer.config, at, DTYPES[bits], target)
    origin = answer.row.source["origin"] if answer.row else None
    return {"kernel": kernel, "device": target.name, "step": answer.step, "config": vars(answer.config),
            "origin": origin, "predicted_us": round(1e6 * seconds, 1)}  # fmt: skip
