"""Which token comes next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mm1.engine.data.record import DataError

STEEPEST = 10  # the largest |length_penalty|: a length to its power is a finite number, and no score is rounded to zero


@dataclass(frozen=True)
class Sampling:
    """How a text goes on. Raises DataError for what cannot be.

    temperature 0: the likeliest token; else one of the top_k likeliest (0: all) and of the smallest set of probability
    ≥ top_p. repetition_penalty: logits of tokens that are in prompt or text, positive divided and negative multiplied
    (Keskar et al. 2019, CTRL). It ends at end-of-text, before the first of `stop`, or after max_tokens.

    num_beams > 1: the text of the best score that beam search finds (beams.py); the score is the sum of the tokens'
    log-probabilities over length^length_penalty, so that above 0 favours long texts and below 0 short ones; it is from
    -10 to 10.
    early_stopping: when the search ends, as in transformers: False, True or "never".
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        fits = {
            "max_tokens": (self.max_tokens >= 1, "≥ 1"), "temperature": (self.temperature >= 0, "≥ 0"),
            "top_p": (0 < self.top_p <= 1, "(0, 1]"), "top_k": (self.top_k >= 0, "≥ 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "> 0"), "num_beams": (self.num_beams >= 1, "≥ 1"),
            "length_penalty": (abs(self.length_penalty) <= STEEPEST, f"-{STEEPEST} to {STEEPEST}"),
            "early_stopping": (self.early_stopping in (False, True, "never"), 'False, True or "never"'),
        }  # fmt: skip
        for name, (good, expected) in fits.items():
            if not good:
                raise DataError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.num_beams > 1 and not self.plain:
            raise DataError(f"{self.num_beams} beams with temperature or repetition_penalty, expected one or the other")

    @property
    def plain(self) -> bool:
        """Greedy, of the logits as they are."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Draw(NamedTuple):
    """How one token is drawn: settings of Sampling, and a number in [0, 1) that decides."""

    temperature: float
    top_p: float
    top_k: int
    u: float


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Of logits [V]; seen int64: tokens."""
    found = logits[seen]
    return logits.index_copy(0, seen, torch.where(found > 0, found / penalty, found * penalty))


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, u: Tensor) -> Tensor:
    """Token ids int64 [B] of logits [B, V], each by its own settings [B] of Sampling and a number u in [0, 1).

    u is a place among the probabilities that are left, likeliest first: what a document gets depends on nobody else's,
    and is the same on every device. Nothing waits for the GPU.
    """
    hot = torch.where(temperature > 0, temperature, 1.0).clamp(min=1e-6)  # below, logits over it may be infinite
    probability, token = (logits.float() / hot[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    rank = torch.arange(logits.shape[1], device=logits.device)
    left = (before < top_p[:, None]) & ((rank < top_k[:, None]) | (top_k[:, None] == 0))
    upto = (probability * left).cumsum(-1)
    # Rounding may leave u · total at or above the last sum; the last that is left is meant then. Of NaN, and of a top_p
    # that is zero in fp32, none is left: the first.
    place = (upto <= (u * upto[:, -1])[:, None]).sum(-1).clamp(max=left.sum(-1) - 1).clamp(min=0)
    place = torch.where(temperature > 0, place, 0)
    return token.gather(-1, place[:, None])[:, 0]
