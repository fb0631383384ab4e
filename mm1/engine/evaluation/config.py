"""Define the settings of an evaluation. The commands `mm1 eval` and `mm1 probe` have an option for each field."""

from dataclasses import dataclass
from math import inf
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


@dataclass(frozen=True)
class ProbeSettings:
    """Define how attentive and linear probes are trained. Raises UserError for an illegal value."""

    rates: Annotated[tuple[float, ...], UNSET] = ()
    """peak learning rates to try (default: 5e-5 to 1e-2 for attentive probes, 1e-4 to 3e-2 for linear ones)."""
    decays: tuple[float, ...] = (0.05, 0.1)
    """weight decays to try with each rate."""
    epochs: int = 100
    """passes over the training images."""
    batch: int = 128
    """images in a step, at least 2."""
    warmup: float = 0.05
    """share of the steps in which the rate rises."""
    final_rate: float = 1e-5
    """learning rate of the last step."""
    clip: float = 3.0
    """limit of the norm of a probe's gradient."""
    seed: int = 0
    """seed of initial values, of the order of images, and of the images that choose rate and decay."""

    def __post_init__(self):
        at_least(1, epochs=self.epochs)
        at_least(2, batch=self.batch)
        require(all(0 < rate < inf for rate in self.rates), "rates", self.rates, "numbers > 0")
        require(all(0 <= decay < inf for decay in self.decays), "decays", self.decays, "numbers ≥ 0")
        require(bool(self.decays), "decays", self.decays, "at least one")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "≥ 0 and < 1")
        require(0 <= self.final_rate < inf, "final_rate", self.final_rate, "a number ≥ 0")
        require(self.clip > 0, "clip", self.clip, "> 0")
