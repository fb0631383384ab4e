"""Define the command `mm1`: a table of its subcommands, and the exit status of each outcome.

Status 0: success. 2: bad arguments or input, with one line on standard error. 130, 143: stopped by a signal, and saved.
1: any other failure. Subcommands are functions in the packages that they belong to; only the module of the one that
runs is imported.
"""

import contextlib
import difflib
import functools
import inspect
import io
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from mm1 import __version__
from mm1.errors import UserError
from mm1.kernels.tuning import TuneError

# name: (module with a function or a dict of functions of this name, line in `mm1 --help`)
COMMANDS = {
    "demo": ("mm1.engine.demo.command", "Train a small MM1 on handwritten digits, and ask it about unseen ones."),
    "train": ("mm1.engine.train.command", "Train a named size or the run of a TOML file."),
    "replay": ("mm1.engine.train.command", "Repeat one step of a run, and explain why its result differs."),
    "plan": ("mm1.engine.train.command", "Estimate memory, time and checkpoints of a run on many GPUs."),
    "convert": ("mm1.engine.convert.command", "Make a checkpoint of published weights, or add experts to one."),
    "tokenizer": ("mm1.engine.data.command", "Make the tokenizer.json that a run needs."),
    "export": ("mm1.engine.train.command", "Write a checkpoint as one safetensors file."),
    "generate": ("mm1.engine.infer.command", "Continue a prompt of interleaved images and text."),
    "serve": ("mm1.engine.serve.command", "Serve OpenAI's chat API, and a page to try the model in a browser."),
    "eval": ("mm1.engine.evaluation.command", "Evaluate a model on benchmarks with few-shot prompts."),
    "probe": ("mm1.engine.evaluation.command", "Score an image encoder by probes on labelled images."),
    "scaling": ("mm1.engine.evaluation.command", "Fit a scaling law to the final losses of runs."),
    "bench": ("mm1.bench.command", "Measure the speed of kernels, training and generation."),
    "tune": ("mm1.autotune.command", "Find the fastest configurations of kernels."),
    "explain": ("mm1.autotune.command", "Print the configuration that a kernel runs with, and why."),
    "doctor": ("mm1.bench.command", "Print the GPU, versions and backends of this machine, and which are missing."),
}
DESCRIPTION = (
    "Train and run MM1-type multimodal models. `mm1 COMMAND --help` explains a command, "
    "`mm1 --version` prints the version."
)
METAVARS = {Path: "PATH", str: "STR", int: "INT", float: "FLOAT"}


def main() -> None:
    """Run the command line, and exit with the status of the outcome."""
    try:
        call(sys.argv[1:])
        sys.stdout.flush()  # an error in it must decide the status too
    except (UserError, TuneError) as error:
        sys.exit(report(error, 2))
    except KeyboardInterrupt as error:  # safety.Stopped, raised by a run that has saved, has a status
        sys.exit(report(str(error) or "stopped", getattr(error, "status", 1)))
    except (OSError, FloatingPointError) as error:  # a full disk, a closed pipe; a loss that is not finite
        sys.stdout = None  # Python would flush it once more, fail again, and exit with 120
        sys.exit(report(error, 1))


def call(arguments: Sequence[str]) -> None:
    """Parse the arguments and run their command. Raises UserError for wrong arguments."""
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
    """Return a function that runs the command of the arguments. Prints help and exits if the arguments ask for it.

    tyro explains a wrong argument in a box of several lines. Raises UserError with this explanation in one line.
    """
    import tyro

    app = tyro.extras.SubcommandApp()
    chosen = arguments[0] if arguments else ""
    for name, (module, summary) in COMMANDS.items():
        if name == chosen or chosen.startswith("--tyro"):  # --tyro-write-completion needs all
            register(app, name, getattr(import_module(module), name))
        elif chosen not in COMMANDS:
            app.command(name=name, help=summary)(lambda: None)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), any_character(sys.stdout):
            return app.cli(
                prog="mm1", description=DESCRIPTION, args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(errors.getvalue())) from None


@contextlib.contextmanager
def any_character(stream: Any) -> Iterator[None]:
    """Write "?" for a character that the stream's encoding lacks, such as "≥" of a help text in ASCII."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


def register(app: Any, name: str, target: Any) -> None:
    """Add a function, or a dict of functions by name, to a tyro app, whose parsing then returns the call unmade.

    The help text of a parameter whose default is None or empty explains this default, so tyro adds nothing to it.
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
    """Return tyro's explanation of a wrong argument as one line: the problem and the options that were probably meant.

    box: lines in a border, or indented by two columns below a title where the terminal is not UTF-8; horizontal lines
    separate sections; help texts, which are omitted, are indented by eight columns or more.
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
    """Print one line on standard error, and return the status."""
    print(f"mm1: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
