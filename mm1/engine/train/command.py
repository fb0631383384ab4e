"""Define the commands of training: `mm1 train`, `replay`, `plan` and `export`."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from mm1.engine.run_config import Run, load_run, to_dict
from mm1.engine.settings import (
    allows_none,
    default,
    described,
    dotted,
    help_texts,
    hints,
    item_table,
    tables_of,
    to_toml,
    toml_value,
)

METAVARS = (("an integer", "INT"), ("a number", "FLOAT"), ("true or false", "{true,false}"), ("a list", "LIST"))
KeyValues = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]


def options(*classes: type) -> type:
    """Return a dataclass of options for tyro: the fields of all `classes`, each a TOML value as text, or None.

    A table becomes options of its own; the model's table has the fields of every registered kind of model. Values are
    checked by load_run, so that files and options have the same errors. Help, ranges and defaults are those that the
    classes declare.
    """
    fields = []
    for field in dict.fromkeys(name for cls in classes for name in hints(cls)):
        owners = [cls for cls in classes if field in hints(cls)]
        if tables := dict.fromkeys(table for cls in owners for table in tables_of(hints(cls)[field])):
            inner = options(*tables)
            fields.append((field, inner, dataclasses.field(default_factory=inner)))
            continue
        hint = hints(owners[0])[field]
        values = " or ".join(dict.fromkeys(described(hints(cls)[field]) for cls in owners))
        metavar = next((name for start, name in METAVARS if values.startswith(start)), "STR")
        value = dataclasses.field(default=None, metadata={"is_text": values.startswith(("a string", "one of"))})
        initial = [default(cls, field) for cls in owners]
        shown = "the size's"
        if dataclasses.MISSING not in initial:
            shown = " or ".join(dict.fromkeys(map(toml_value, initial)))
        if table := item_table(hint):
            items = (f"{name}: {described(item)}" for name, item in hints(table).items())
            values = f"a list of tables with {'; '.join(items)}"
        legal = f"({values}{', or none' * allows_none(hint)}; default: {shown})"
        option = tyro.conf.arg(help=help_texts(owners[0])[field], metavar=metavar, help_behavior_hint=legal)
        fields.append((field, Annotated[str | None, option], value))
    return dataclasses.make_dataclass(
        classes[0].__name__, fields, frozen=True, namespace={"__doc__": classes[0].__doc__}
    )


def chosen(settings: Any, name: str = "") -> Iterator[str]:
    """Yield "key=value", as load_run takes it, for each of the `options` that has a value."""
    for field in dataclasses.fields(settings):
        value, full = getattr(settings, field.name), dotted(name, field.name)
        if dataclasses.is_dataclass(value):
            yield from chosen(value, full)
        elif value is not None:
            yield f"{full}={toml_value(value) if field.metadata['is_text'] else value}"


RunOptions = options(Run)


def train(
    run: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")],
    /,
    out: Path | None = None,
    set: KeyValues = (),
    resume: bool = False,
    show: bool = False,
    accept_other_data: bool = False,
    profile: bool = False,
    settings: Annotated[RunOptions, tyro.conf.arg(name="")] = RunOptions(),  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    """Train a named size or the run of a TOML file.

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop with status 143, or 130 for Ctrl-C; 1 if nothing was saved.
    All settings are options too; docs/settings.md has them in tables.

    Args:
        run: a named size (digits, mm1-3b, …) or a .toml file.
        out: folder for checkpoints and metrics (default: runs/NAME).
        set: a setting that replaces the file's, such as train.steps=100; --train.steps 100 does the same.
        resume: continue from the newest complete checkpoint in the folder, or start if the folder has none.
        show: print all settings of the run as TOML, which is itself a run, and do not train.
        accept_other_data: continue although data, seed, sizes of a sequence or tokenizer differ from the checkpoint's.
        profile: write a trace and a table of the parts of four steps to the subfolder profile, and print the table.
    """
    config = load_run(run, (*set, *chosen(settings)))
    if show:
        print(to_toml(to_dict(config)))
        return
    from mm1.engine.train.trainer import train

    folder = out or Path("runs") / Path(run).stem
    train(config, folder, resume=resume, profile=profile, accept_other_data=accept_other_data)
    if profile and _is_first():
        print((folder / "profile" / "table.txt").read_text())


def replay(folder: Path, /, step: int) -> None:
    """Compute one step of a run again, and tell whether its data, the hardware or a kernel makes it differ.

    For a run of several processes, start it under torchrun with as many, which compares exactly, or as one process,
    which compares within the rounding of the dtype.
    The last line of standard output is one JSON object.

    Args:
        folder: the run's folder.
        step: number of the step, as in metrics.jsonl.
    """
    from mm1.engine.train.replay import replay, show

    report = replay(folder, step)
    if _is_first():
        print(show(report))
        print(json.dumps(report))


def plan(
    run: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")],
    /,
    gpus: int = 8,
    device: str = "h200",
    set: KeyValues = (),
    share: float | None = None,
    network: float = 50.0,
    document: int = 1024,
    imbalance: float = 1.25,
    storage: float = 2.0,
    host_memory: float | None = None,
) -> None:
    """Estimate memory, time and checkpoints of a run on many GPUs, and print what the estimate assumes.

    Nothing is allocated. The last line of standard output is one JSON object.

    Args:
        run: a named size (digits, mm1-3b, …) or a .toml file.
        gpus: number of GPUs; eight are one node.
        device: type of GPU, such as h100, h200, b200 or mi300x.
        set: a setting that replaces the file's, such as parallel.tensor=8.
        share: share of the GPU's peak rate that operations reach, 0 to 1 (default: 0.40 for dense models, 0.25 for
            mixtures of experts).
        network: rate in GB/s at which a GPU sends to other nodes.
        document: tokens of a typical document; attention in longer ones takes more operations.
        imbalance: tokens of the fullest process that shares experts, divided by the mean; 1 is perfectly balanced.
        storage: rate in GB/s at which a node writes and reads checkpoints; 2 is an NVMe drive or an NFS server.
        host_memory: host memory of a node in GB, compared with the estimate (default: no comparison).
    """
    from mm1.engine.train import plan as estimate

    result = estimate.plan(
        load_run(run, set), gpus, device, share=share, network=network, document=document, imbalance=imbalance,
        storage=storage, host_memory=host_memory,
    )  # fmt: skip
    print(estimate.show(result))
    print(json.dumps(dataclasses.asdict(result)))


def export(checkpoint: Path, out: Path, /) -> None:
    """Write a checkpoint of one process or many as one safetensors file with config and tokenizer.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        out: folder to write.
    """
    from mm1.engine.train.checkpoint import export

    export(checkpoint, out)
    print(out)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
