"""How a text goes on: the settings of a request, and the drawing of a token from logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from mm1.errors import UserError

if TYPE_CHECKING:
    from mm1.engine.infer.grammar import Grammar

TOP_LOGPROBS = 20  # the most alternatives to a token that a request can ask for
STEEPEST = 10  # the largest |length_penalty|: a length to its power is a finite number, and no score is rounded to zero
LARGEST = 1e6  # of what changes logits: they stay finite in fp32, or what is drawn of them would be undefined
BOUNDS = {
    "temperature": (0, LARGEST), "top_p": (1 / LARGEST, 1), "top_k": (0, 1 << 24), "min_p": (0, 1),
    "repetition_penalty": (1 / LARGEST, LARGEST), "frequency_penalty": (-LARGEST, LARGEST),
    "presence_penalty": (-LARGEST, LARGEST), "length_penalty": (-STEEPEST, STEEPEST), "top_logprobs": (0, TOP_LOGPROBS),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a text goes on. Raises UserError for what cannot be.

    max_tokens: 0 generates nothing, for scoring a prompt. A text ends at end-of-text, before the first of `stop`, or
    after max_tokens. Of stop strings that overlap the one that is complete first ends it.

    temperature 0: the likeliest token. Otherwise one is drawn after these steps, in vLLM's and transformers' order:

    1. logit_bias: token -> what is added to its logit.
    2. repetition_penalty: logits of tokens that are in prompt or text, positive divided and negative multiplied
       (Keskar et al. 2019, CTRL).
    3. frequency_penalty, presence_penalty (OpenAI): a token that is n times in the text, the prompt not counted, loses
       n · frequency_penalty + (n > 0) · presence_penalty.
    4. grammar: tokens that it does not allow here get probability 0. End-of-text is allowed where it may end.
    5. temperature: logits are divided by it.
    6. top_k: only the k likeliest stay (0: all).
    7. top_p: of these the smallest set whose probabilities sum to at least top_p; they sum to 1 before.
    8. min_p: only tokens of at least min_p times the likeliest one's probability stay.

    With temperature 0 steps 1 to 4 come first too. The log-probabilities of a request are the model's own, before all
    of these. top_logprobs: how many of the likeliest tokens are kept beside each token, with theirs.

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
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    top_logprobs: int = 0
    grammar: "Grammar | None" = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "logit_bias", tuple(dict(self.logit_bias).items()))  # it can be hashed
        fits = {
            "max_tokens": (self.max_tokens >= (1 if self.num_beams > 1 else 0), "≥ 0, and of beams ≥ 1"),
            "num_beams": (self.num_beams >= 1, "≥ 1"),
            "early_stopping": (self.early_stopping in (False, True, "never"), 'False, True or "never"'),
            "logit_bias": (
                all(token >= 0 and abs(bias) <= LARGEST for token, bias in self.biases),
                f"token ids ≥ 0 and numbers from {-LARGEST} to {LARGEST}",
            ),
        } | {name: (low <= getattr(self, name) <= high, f"{low} to {high}") for name, (low, high) in BOUNDS.items()}
        for name, (good, expected) in fits.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.num_beams > 1 and not (self.plain and self.top_logprobs == 0):
            what = "temperature or repetition_penalty, nor with what else changes logits, or top_logprobs"
            raise UserError(f"{self.num_beams} beams with {what}, expected one or the other")

    @property
    def biases(self) -> Sequence[tuple[int, float]]:
        return self.logit_bias  # pyright: ignore[reportReturnType]: it is a tuple of pairs from __post_init__ on

    @property
    def alters(self) -> bool:
        """Say whether logits are changed before a token is drawn: steps 1 to 4."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or bool(self.logit_bias) or self.grammar is not None

    @property
    def plain(self) -> bool:
        """Say whether the next token is the likeliest of the logits as they are."""
        return self.temperature == 0 and not self.alters


def read_biases(pairs: Sequence[str]) -> dict[int, float]:
    """Read logit_bias from a command line, such as ["5=-100"]. Raises UserError."""
    try:
        return {int(token): float(bias) for token, bias in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise UserError(f"logit_bias is {' '.join(pairs)!r}, expected TOKEN=BIAS, such as 5=-100") from None


class Draw(NamedTuple):
    """How one token is drawn: settings of Sampling, and a number u in [0, 1) that decides."""

    temperature: float
    top_p: float
    top_k: int
    u: float
    min_p: float = 0.0


def penalized(logits: Tensor, cells: Tensor | tuple[Tensor, Tensor], penalty: float | Tensor) -> Tensor:
    """Return logits with the repetition penalty on some cells.

    cells: tokens int64 [n] of logits [V], or rows and tokens int64 [n] of logits [B, V]; penalty: one number, or [n].
    """
    before, after = logits[cells], logits.clone()
    after[cells] = torch.where(before > 0, before / penalty, before * penalty)
    return after


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, u: Tensor, min_p: Tensor | None = None
) -> Tensor:
    """Return token ids int64 [B] of logits [B, V], each by its own settings [B] of Sampling and a number u in [0, 1).

    u is a place among the probabilities that are left, likeliest first: what a document gets depends on nobody else's,
    and is the same on every device. Nothing waits for the GPU.
    """
    hot = torch.where(temperature > 0, temperature, 1.0).clamp(min=1e-6)  # below, logits over it may be infinite
    probability, token = (logits.float() / hot[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    left = ((rank < top_k[:, None]) | (top_k[:, None] == 0)) & (probability > 0)
    first_k = probability * left
    upto = first_k.cumsum(-1)
    total = torch.where(top_k == 0, 1.0, upto[:, -1])[:, None]
    left = left & (upto - first_k < top_p[:, None] * total)
    if min_p is not None:
        left = left & (probability >= min_p[:, None] * probability[:, :1])
    upto = (probability * left).cumsum(-1)
    # Rounding may leave u · total at or above the last sum, as u may be 1 in fp32; the last that is left is meant then,
    # which has a probability above 0. Of NaN, and of a top_p that is zero in fp32, none is left: the first.
    place = (upto <= (u * upto[:, -1])[:, None]).sum(-1).clamp(max=left.sum(-1) - 1).clamp(min=0)
    place = torch.where(temperature > 0, place, 0)
    return token.gather(-1, place[:, None])[:, 0]
