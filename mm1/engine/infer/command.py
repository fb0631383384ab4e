"""The command `mm1 generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Repeated = tyro.conf.UseAppendAction


@dataclass(frozen=True)
class SamplingOptions:
    """How each next token is chosen."""

    temperature: float = 0.0
    """divide logits by this before a token is drawn; 0: always take the most likely token (greedy)."""
    top_p: float = 1.0
    """sample only from the most likely tokens whose probabilities sum to this, 0 to 1; 1: no limit."""
    top_k: int = 0
    """sample only from the k most likely tokens; 0: no limit."""
    min_p: float = 0.0
    """sample only tokens of at least this fraction of the most likely token's probability, 0 to 1; 0: no limit."""
    repetition_penalty: float = 1.0
    """divide the positive logits of tokens that are in the prompt or the text by this, and multiply the negative ones;
    1: none."""
    frequency_penalty: float = 0.0
    """subtract this from a token's logit for each time that it is in the text."""
    presence_penalty: float = 0.0
    """subtract this once from the logit of a token that is in the text."""
    logit_bias: Annotated[Repeated[tuple[str, ...]], tyro.conf.arg(metavar="TOKEN=BIAS")] = ()
    """add a number to the logit of the token with this id, such as 5=-100."""
    num_beams: int = 1
    """texts that beam search keeps; 1: no beam search."""
    length_penalty: float = 1.0
    """beam search divides a text's log-probability by its length to the power of this, -10 to 10; above 0 favours long
    texts."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """seed of the sampling (default: another one each time)."""


def generate(
    checkpoint: Path,
    /,
    prompt: Repeated[tuple[str, ...]] = (),
    image: Repeated[tuple[Path, ...]] = (),
    max_tokens: int = 64,
    stop: Repeated[tuple[str, ...]] = (),
    weights: Literal["int8", "int4", "float8"] | None = None,
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = SamplingOptions(),
) -> None:
    """Continue a prompt of interleaved images and text.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        prompt: text; `<image>` marks the place of the next image, and images without a mark come first.
        image: an image file.
        max_tokens: tokens to generate at most; the text ends earlier where prompt and text reach the model's context.
        stop: end the text before this string.
        weights: round the decoder's weights to fewer bits (default: no rounding).
    """
    from mm1 import load
    from mm1.engine.data.images import read
    from mm1.engine.infer.generate import generate
    from mm1.engine.infer.prompts import interleave
    from mm1.engine.infer.sampling import read_biases

    prompts = interleave(prompt or ("",), [read(path) for path in image])

    def show(number: int, piece: str) -> None:
        print(piece, end="", flush=True)

    model = load(checkpoint)
    settings = {**vars(sampling), "logit_bias": read_biases(sampling.logit_bias)}
    for parts in prompts:
        generate(model, [parts], max_tokens=max_tokens, stop=stop, weights=weights, on_text=show, **settings)
        print()
