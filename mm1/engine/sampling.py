"""Which token comes next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mm1.engine.data.record import DataError


@dataclass(frozen=True)
class Sampling:
    """How a text goes on. Raises DataError for what cannot be.

    temperature 0: the likeliest token; else one of the top_k likeliest (0: all) and of the smallest set of probability
    ≥ top_p. repetition_penalty: logits of tokens that are in prompt or text, positive divided and negative multiplied
    (Keskar et al. 2019, CTRL). It ends at end-of-text, before the first of `stop`, or after max_tokens.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self):
        fits = {
            "max_tokens": (self.max_tokens >= 1, "≥ 1"), "temperature": (self.temperature >= 0, "≥ 0"),
            "top_p": (0 < self.top_p <= 1, "(0, 1]"), "top_k": (self.top_k >= 0, "≥ 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "> 0"),
        }  # fmt: skip
        for name, (good, expected) in fits.items():
            if not good:
                raise DataError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def plain(self) -> bool:
        """Greedy, of the logits as they are."""
        return self.temperature == 0 and self.repetition_penalty == 1


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Of logits [V]; seen int64: tokens."""
    found = logits[seen]
    return logits.index_copy(0, seen, torch.where(found > 0, found / penalty, found * penalty))


def sample(
    logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Token ids int64 [B] of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0.0)
    if top_k:
        probability = probability[:, :top_k]
    return token.gather(-1, torch.multinomial(probability, 1, generator=generator))[:, 0]
