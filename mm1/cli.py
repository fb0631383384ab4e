"""The command `mm1`: a table of its commands, and the exit status of each outcome.

Status 0: success. 2: bad arguments or input, one line on standard error. 130, 143: stopped by a signal, and saved.
1: whatever else went wrong. Commands are functions in the packages that they belong to; only the module of the command
that runs is imported.
"""

import contextlib
import difflib
import functools
import inspect
import io
import re
import sys
import typing
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from mm1 import __version__
from mm1.errors import UserError
from mm1.kernels.tuning import TuneError


class Command(NamedTuple):
    """The module of a command, and its line in `mm1 --help`."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command(
        "mm1.engine.demo.command", "Train a small MM1 on handwritten digits, and ask it about unseen ones."
    ),
    "train": Command("mm1.engine.train.command", "Train a named size or the run of a TOML file."),
    "replay": Command("mm1.engine.train.command", "Compute one step of a run again, and say why it differs."),
    "plan": Command("mm1.engine.train.command", "Estimate memory, time and checkpoints of a run on many GPUs."),
    "convert": Command("mm1.engine.convert.command", "Make a checkpoint of published weights, or add experts to one."),
    "tokenizer": Command("mm1.engine.data.command", "Make the tokenizer.json that a run needs."),
    "export": Command("mm1.engine.train.command", "Write a checkpoint as one safetensors file."),
    "generate": Command("mm1.engine.infer.command", "Continue a prompt of interleaved images and text."),
    "serve": Command("mm1.engine.serve.command", "Serve OpenAI's chat API, and a page to try the model on."),
    "eval": Command("mm1.engine.evaluation.command", "Evaluate a model on benchmarks with few-shot prompts."),
    "bench": Command("mm1.bench.command", "Measure kernels, training and generation."),
    "tune": Command("mm1.autotune.command", "Find the configurations that kernels run with."),
    "explain": Command("mm1.autotune.command", "Say which configuration a kernel runs with, and why."),
    "doctor": Command("mm1.autotune.command", "Say what this machine has, and what is missing."),
}
DESCRIPTION = (
    "Train and run MM1-type multimodal models. `mm1 COMMAND --help` explains a command, "
    "`mm1 --version` prints the version."
)
METAVARS = {Path: "PATH", str: "STR", int: "INT", float: "FLOAT"}


def main() -> None:
    """Run the command line. Exits with the status that the outcome has."""
    try:
        call(sys.argv[1:])
        sys.stdout.flush()  # or an error in it would come after the status was decided
    except (UserError, TuneError) as error:
        sys.exit(report(error, 2))
    except KeyboardInterrupt as error:  # safety.Stopped, of a run that has saved, has a status
        sys.exit(report(str(error) or "stopped", getattr(error, "status", 1)))
    except (OSError, FloatingPointError) as error:  # a full disk, a closed pipe; a loss that is not finite
        sys.stdout = None  # Python would flush it once more, fail again, and exit with 120
        sys.exit(report(error, 1))


def call(arguments: Sequence[str]) -> None:
    """Parse the arguments and run their command. Raises UserError for arguments that are wrong."""
    command = arguments[0] if arguments else ""
    if command == "--version":
        print(f"mm1 {__version__}")
    elif command in COMMANDS or not command or command.startswith("-"):
        parse(arguments)()
    else:
        similar = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command!r}, {hint}")


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Return the command of the arguments, ready to be called. Prints help and exits where it is asked for.

    tyro explains a wrong argument in a box of several lines, which becomes one line here: the text of a UserError.
    """
    import tyro

    app = tyro.extras.SubcommandApp()
    chosen = arguments[0] if arguments else ""
    for name, command in COMMANDS.items():
        if name == chosen or chosen.startswith("--tyro"):  # --tyro-write-completion needs all
            register(app, name, getattr(import_module(command.module), name))
        elif chosen not in COMMANDS:
            app.command(name=name, help=command.summary)(lambda: None)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return app.cli(
                prog="mm1", description=DESCRIPTION, args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(errors.getvalue())) from None


def register(app: Any, name: str, target: Any) -> None:
    """Add a function, or a dict of functions by name, to a tyro app, so that parsing returns the call unmade.

    A parameter that is None or empty by default says in its help text what that means: tyro adds nothing to it.
    """
    import tyro

    if isinstance(target, dict):
        inner = tyro.extras.SubcommandApp()
        for inner_name, function in target.items():
            register(inner, inner_name, function)
        app.command(inner, name=name)
        return

    def deferred(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(target, *args, **kwargs)

    hints, parameters = typing.get_type_hints(target, include_extras=True), []
    for parameter in inspect.signature(target).parameters.values():
        hint = hints[parameter.name]
        if parameter.default is None:
            hint = Annotated[hint, tyro.conf.arg(metavar=metavar(hint), help_behavior_hint="")]
        elif parameter.default == () and parameter.kind is parameter.POSITIONAL_ONLY:
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        hints[parameter.name] = hint
        parameters.append(parameter.replace(annotation=hint))
    deferred.__doc__, deferred.__annotations__ = target.__doc__, hints
    vars(deferred)["__signature__"] = inspect.Signature(parameters)
    app.command(name=name)(deferred)


def metavar(hint: Any) -> str:
    """Return the placeholder of an optional parameter's value: "PATH", or "{a,b}" for a choice."""
    kind = typing.get_args(typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint)[0]
    return f"{{{','.join(typing.get_args(kind))}}}" if typing.get_origin(kind) is Literal else METAVARS[kind]


def one_line(box: str) -> str:
    """Return tyro's explanation of a wrong argument as one line, without help texts: what is wrong, and what is meant.

    box: lines in a border, or indented by two columns below a title where the terminal is not UTF-8; horizontal lines
    separate sections; help texts are indented by eight columns or more.
    """
    sections: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines():
        text = line[2:].rstrip(" │")
        if text and set(text) <= set("─-"):
            sections.append([])
        elif line[:1] not in ("╭", "╰", "") and not text.startswith(" " * 8):
            sections[-1].append(text.strip())
    problem, *others = (sections if box.startswith("╭") else sections[1:]) or [box.split()]
    meant = [re.findall(r"--[\w.-]+", " ".join(lines)) for lines in others if lines[:1] == ["Perhaps you meant:"]]
    return " ".join(problem) + (f", did you mean {' or '.join(meant[0])}?" if meant else "")


def report(message: object, status: int) -> int:
    """Print one line on standard error; returns the status."""
    print(f"mm1: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
