"""Define the command `mm1 generate`."""

from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from mm1.engine.infer.sampling import Sampling, read_biases
from mm1.engine.settings import default, help_texts, hints

Repeated = tyro.conf.UseAppendAction
OWN_TYPES = {
    "stop": Repeated[tuple[str, ...]],
    "seed": Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")],
    "logit_bias": Annotated[Repeated[tuple[str, ...]], tyro.conf.arg(metavar="TOKEN=BIAS")],
}


def _field(name: str, text: str) -> tuple[str, Any, Any]:
    """Return the option of a field of Sampling, as make_dataclass takes it."""
    kind = OWN_TYPES.get(name) or (get_args(hints(Sampling)[name]) or (hints(Sampling)[name],))[0]
    return name, Annotated[kind, tyro.conf.arg(help=text)], default(Sampling, name)


# The fields of Sampling that have a help text.
SamplingOptions = make_dataclass("SamplingOptions", [_field(*item) for item in help_texts(Sampling).items()])


def generate(
    checkpoint: Path,
    /,
    prompt: Repeated[tuple[str, ...]] = (),
    image: Repeated[tuple[Path, ...]] = (),
    weights: Literal["int8", "int4", "float8"] | None = None,
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = SamplingOptions(),  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    """Continue a prompt of interleaved images and text.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        prompt: text; `<image>` marks the place of the next image, and images without a mark come first.
        image: an image file.
        weights: round the decoder's weights to fewer bits (default: no rounding).
    """
    from mm1 import load
    from mm1.engine.data.images import read
    from mm1.engine.infer.generate import generate
    from mm1.engine.infer.prompts import interleave

    settings = {**vars(sampling), "logit_bias": read_biases(sampling.logit_bias)}
    prompts = interleave(prompt or ("",), [read(path) for path in image])
    model = load(checkpoint)
    for parts in prompts:
        generate(model, [parts], weights=weights, on_text=lambda _, piece: print(piece, end="", flush=True), **settings)
        print()
