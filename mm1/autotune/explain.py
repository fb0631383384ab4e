"""Explain which configuration a kernel gets, and why, for `mm1 explain`."""

from typing import Any

from mm1.autotune.space import DTYPES, chosen, shape_named, short
from mm1.autotune.timing import device_named
from mm1.kernels.tuning import Answer, chain


def explain(kernel: str, shape: str, device: str | None, bits: int = 16) -> dict[str, Any]:
    """Print which step of the look-up answers, and why earlier ones do not; return the answer."""
    tunable = chosen([kernel])[0]
    target, at = device_named(device), shape_named(tunable, shape)
    print(f"{kernel}  {short(at)}  {bits} bits  {target.name} ({target.arch}, {target.units} units)")
    answers: list[Answer] = []
    for answer in chain(tunable, at, DTYPES[bits], target):
        first = answer.config is not None and not any(a.config is not None for a in answers)
        answers.append(answer)
        print(f"{'→' if first else ' '} {answer.step:10} {answer.why}")
    answer = next(a for a in answers if a.config is not None)
    print(short(answer.config))
    seconds = tunable.seconds(answer.config, at, DTYPES[bits], target)
    origin = answer.row.source["origin"] if answer.row else None
    return {"kernel": kernel, "device": target.name, "step": answer.step, "config": vars(answer.config),
            "origin": origin, "predicted_us": round(1e6 * seconds, 1)}  # fmt: skip
