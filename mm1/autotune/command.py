"""Define the commands about configurations of kernels: `mm1 tune` and `mm1 explain`."""

import json
import os
import sys
from pathlib import Path

import tyro

from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import TuneError


def tune(
    kernels: tuple[str, ...] = (),
    /,
    budget: float = 60.0,
    shape: str | None = None,
    static: bool = False,
    check: bool = False,
    device: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: Path | None = None,
    log: Path | None = None,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Find the configurations that kernels run with. The last line of standard output is JSON.

    Measures on this machine's GPU, and keeps configurations that are faster than the default in the user's cache.
    Under torchrun rank 0 measures for all ranks.

    Args:
        kernels: names of kernels (default: all).
        budget: total seconds to measure.
        shape: shape to measure at, such as "rows=8192 experts=64 k=2048 n=1408" (default: the shapes of the models).
        static: predict for --device without measuring: compile, inspect the machine code, write tables.
        check: verify that every row of the tables compiles to sound code, for --device or for every GPU.
        device: a GPU that has tables, such as h200.
        out: folder of tables to write or to check (default: this package's; measured rows go to the user's cache).
        log: file of trials to continue from and to append to (default: in the user's cache).
        processes: number of processes that compile at once; without it, one for each CPU core.
    """
    if device and not (static or check):
        raise TuneError("--device needs --static or --check; measuring uses this machine's GPU")
    if processes < 1:
        raise TuneError(f"--processes is {processes}, expected at least 1")
    from mm1.kernels.language import INSTALLED

    if not INSTALLED:
        raise TuneError("tuning compiles kernels with Triton, which is not installed: pip install triton")
    from mm1.autotune import predict
    from mm1.autotune.tables import TABLES
    from mm1.autotune.timing import device_named
    from mm1.autotune.tune import tune

    if check:
        faults = predict.check(kernels, [device_named(name) for name in device or DEVICES], out or TABLES, processes)
        print("\n".join([*faults, json.dumps({"faults": len(faults)})]))
        sys.exit(1 if faults else 0)
    if static:
        if out is None and not (TABLES.parents[2] / "pyproject.toml").is_file():
            raise TuneError("the tables of an installed package are not changed: choose a folder with --out")
        devices = [device_named(name) for name in device or (None,)]
        print(json.dumps([predict.predict(kernels, d, out or TABLES, processes) for d in devices]))
    else:
        print(json.dumps(tune(kernels, budget, shape=shape, folder=out, log=log, processes=processes)))


def explain(kernel: str, shape: tuple[str, ...], /, device: str | None = None) -> None:
    """Print which configuration a kernel gets for a shape, and why. The last line is one JSON object.

    Args:
        kernel: name of a kernel, such as grouped_gemm.
        shape: sizes, such as rows=8192 experts=64 k=2048 n=1408.
        device: a GPU that has tables, such as h200 (default: this machine's).
    """
    from mm1.autotune.explain import explain

    print(json.dumps(explain(kernel, " ".join(shape), device)))
