"""The commands of training: `mm1 train`, `replay`, `plan` and `export`."""

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
    nested,
    table_of,
    to_toml,
    toml_value,
)

METAVARS = (("an integer", "INT"), ("a number", "FLOAT"), ("true or false", "{true,false}"), ("a list", "LIST"))
KeyValues = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]


def options(cls: type) -> type:
    """Return a dataclass that tyro shows as the settings of `cls`: its fields are the TOML values as text, or None.

    Only the text is taken from the command line: whether it is legal is decided where files are checked, so that both
    say the same. Help, ranges and defaults are those that `cls` declares.
    """
    fields, texts = [], help_texts(cls)
    for field, hint in hints(cls).items():
        if table := table_of(hint):
            inner = options(table)
            fields.append((field, inner, dataclasses.field(default_factory=inner)))
        else:
            values, initial = described(hint), default(cls, field)
            metavar = next((name for start, name in METAVARS if values.startswith(start)), "STR")
            shown = "the size's" if initial is dataclasses.MISSING else toml_value(initial)
            if table := nested(hint):
                items = (f"{name}: {described(item)}" for name, item in hints(table).items())
                values = f"a list of tables with {'; '.join(items)}"
            legal = f"({values}{', or none' * allows_none(hint)}; default: {shown})"
            option = tyro.conf.arg(help=texts.get(field, ""), metavar=metavar, help_behavior_hint=legal)
            fields.append((field, Annotated[str | None, option], None))
    made = dataclasses.make_dataclass(cls.__name__, fields, frozen=True)
    made.__doc__ = cls.__doc__
    return made


def chosen(settings: Any, cls: type, name: str = "") -> Iterator[str]:
    """Yield "key=value", as load_run takes it, for each option of `settings`, an options(cls), that has a value."""
    for field, hint in hints(cls).items():
        value, full = getattr(settings, field), dotted(name, field)
        if table := table_of(hint):
            yield from chosen(value, table, full)
        elif value is not None:
            is_text = described(hint).startswith(("a string", "one of"))
            yield f"{full}={toml_value(value) if is_text else value}"


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

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop with status 143, or 130 for Ctrl-C. All settings are options
    too; docs/settings.md has them in tables.

    Args:
        run: a named size (digits, mm1-3b, …) or a .toml file.
        out: folder for checkpoints and metrics (default: runs/NAME).
        set: a setting, such as train.steps=100, over the file's; the same as --train.steps 100.
        resume: continue from the newest complete checkpoint in the folder, or start if there is none.
        show: print all settings of the run as TOML, which is itself a run, and do not train.
        accept_other_data: continue although data, seed, sizes of a sequence or tokenizer differ from the checkpoint's.
        profile: write a trace and a table of the parts of four steps to the subfolder profile, and print the table.
    """
    config = load_run(run, (*set, *chosen(settings, Run)))
    if show:
        print(to_toml(to_dict(config)))
        return
    from mm1.engine.train.trainer import train

    folder = out or Path("runs") / Path(run).stem
    train(config, folder, resume=resume, profile=profile, accept_other_data=accept_other_data)
    if profile and _is_first():
        print((folder / "profile" / "table.txt").read_text())


def replay(folder: Path, /, step: int) -> None:
    """Compute one step of a run again, and say whether its data, the hardware or a kernel makes it differ.

    A run of several processes is replayed under torchrun on as many, or on one within the rounding of its precision.
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
        set: a setting, such as parallel.tensor=8, over the file's.
        share: share of the GPU's peak rate that its operations reach, 0 to 1 (default: 0.40 for dense models, 0.25 for
            mixtures of experts).
        network: rate in GB/s at which a GPU sends to other nodes.
        document: tokens of a typical document; attention in longer ones takes more operations.
        imbalance: tokens of the fullest process that shares experts, divided by the mean; 1 is perfectly balanced.
        storage: rate in GB/s at which a node writes checkpoints and reads them; 2 is an NVMe drive or an NFS server.
        host_memory: host memory of a node in GB, to compare the need with (default: print the need only).
    """
    from mm1.engine.train import plan as estimate

    result = estimate.plan(
        load_run(run, set), gpus, device, share=share, network=network, document=document, imbalance=imbalance,
        storage=storage, host_memory=host_memory,
    )  # fmt: skip
    print(estimate.show(result))
    print(json.dumps(estimate.to_dict(result)))


def export(checkpoint: Path, out: Path, /) -> None:
    """Write a checkpoint, of one process or of many, as one safetensors file with config and tokenizer.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        out: folder to write.
    """
    from mm1.engine.train.checkpoint import export

    export(checkpoint, out)
    print(out)


def _is_first() -> bool:
    """Say whether this is torchrun's process 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"
