"""Define the settings of an evaluation. The command `mm1 eval` has an option for each field."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from mm1.errors import at_least, require

Choose = Literal["random", "fixed", "similar"]
Normalize = Literal["sum", "mean"]
UNSET = tyro.conf.arg(help_behavior_hint="")  # the help text describes the default


@dataclass(frozen=True)
class ShotSettings:
    """Define how the examples in a prompt, the shots, are chosen and shown. Raises UserError for an illegal value."""

    choose: Choose = "random"
    """draw examples at random for each query, take the same for all, or take those with the most similar images."""
    text_shots: bool = False
    """begin zero-shot prompts with two examples without images, as Flamingo does and MM1 does not."""
    high: Annotated[int | None, UNSET, tyro.conf.arg(metavar="INT")] = None
    """give only this many of a prompt's last images their sub-images (default: all)."""

    def __post_init__(self):
        require(self.choose in get_args(Choose), "choose", self.choose, f"one of {', '.join(get_args(Choose))}")
        at_least(0, high=self.high)


@dataclass(frozen=True)
class Decoding:
    """Define how answers are chosen. Raises UserError for an illegal value."""

    num_beams: int = 1
    """texts that beam search keeps; 1: greedy. OpenFlamingo has 3."""
    length_penalty: float = 0.0
    """beam search divides a text's log-probability by its length to the power of this, -10 to 10; OpenFlamingo has 0,
    its first version -2."""
    normalize: Annotated[Normalize | None, UNSET, tyro.conf.arg(metavar="{sum,mean}")] = None
    """compare options by the sum or the mean of their tokens' log-probabilities (default: mean for seed, else sum)."""

    def __post_init__(self):
        require(self.normalize in (None, *get_args(Normalize)), "normalize", self.normalize, "sum or mean")
