"""Define the sampling settings of a request, and draw tokens from logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from mm1.errors import UserError

if TYPE_CHECKING:
    from mm1.engine.infer.grammar import Grammar

TOP_LOGPROBS = 20  # limit of alternatives to a token
STEEPEST = 10  # limit of |length_penalty|: length^length_penalty stays finite, and no score is rounded to zero
LARGEST = 1e6  # limit of numbers that change logits: those must stay finite in fp32 to be sampled from
BOUNDS = {
    "temperature": (0, LARGEST), "top_p": (1 / LARGEST, 1), "top_k": (0, 1 << 24), "min_p": (0, 1),
    "repetition_penalty": (1 / LARGEST, LARGEST), "frequency_penalty": (-LARGEST, LARGEST),
    "presence_penalty": (-LARGEST, LARGEST), "length_penalty": (-STEEPEST, STEEPEST), "top_logprobs": (0, TOP_LOGPROBS),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Says how the tokens of a text are chosen and when it ends. Raises UserError for a value outside its range.

    A text ends at end-of-text, before the first stop string of `stop`, or after max_tokens; with max_tokens 0 nothing
    is generated, which serves to score a prompt. Of overlapping stop strings the one that is complete first counts.

    A token is drawn after these steps, in the order of vLLM and transformers; with temperature 0 the likeliest token
    after steps 1 to 4 is chosen instead:

    1. logit_bias: add a number to the logits of some tokens.
    2. repetition_penalty: for tokens in prompt or text, divide positive logits by it and multiply negative ones
       (Keskar et al. 2019, CTRL).
    3. frequency_penalty, presence_penalty (OpenAI): from the logit of a token that occurs n times in the text, without
       the prompt, subtract n · frequency_penalty + (n > 0) · presence_penalty.
    4. grammar: tokens that it does not allow next get probability 0; end-of-text is allowed where the text may end.
    5. temperature: divide logits by it.
    6. top_k: sample only from the k most likely tokens (0: no limit).
    7. top_p: of these only from the smallest set whose probabilities, normalized to 1 before, sum to at least top_p.
    8. min_p: of these only from tokens with at least min_p times the probability of the likeliest one.

    seed: of this request's random numbers; None draws a different text each time. top_logprobs: number of alternatives
    that are recorded for each token. Log-probabilities are the model's own, before all of these steps.

    num_beams > 1 returns the text that beam search scores best (beams.py). A score is the sum of the tokens'
    log-probabilities over length^length_penalty, so that values above 0 favour long texts and values below 0 short
    ones; length_penalty is from -10 to 10. early_stopping: when the search ends, as in transformers: False, True or
    "never".
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
        object.__setattr__(self, "logit_bias", tuple(dict(self.logit_bias).items()))  # hashable
        valid = {
            "max_tokens": (self.max_tokens >= (1 if self.num_beams > 1 else 0), "≥ 0, and of beams ≥ 1"),
            "num_beams": (self.num_beams >= 1, "≥ 1"),
            "early_stopping": (self.early_stopping in (False, True, "never"), 'False, True or "never"'),
            "logit_bias": (
                all(token >= 0 and abs(bias) <= LARGEST for token, bias in self.biases),
                f"token ids ≥ 0 and numbers from {-LARGEST} to {LARGEST}",
            ),
        } | {name: (low <= getattr(self, name) <= high, f"{low} to {high}") for name, (low, high) in BOUNDS.items()}
        for name, (good, expected) in valid.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.num_beams > 1 and not (self.plain and self.top_logprobs == 0):
            others = "temperature, penalties, logit_bias, grammar or top_logprobs"
            raise UserError(f"{self.num_beams} beams with {others}, expected either num_beams 1 or none of these")

    @property
    def biases(self) -> Sequence[tuple[int, float]]:
        """Return logit_bias as pairs of token and number."""
        return self.logit_bias  # pyright: ignore[reportReturnType]: it is a tuple of pairs from __post_init__ on

    @property
    def alters(self) -> bool:
        """Say whether any of steps 1 to 4 changes the logits."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or bool(self.logit_bias) or self.grammar is not None

    @property
    def plain(self) -> bool:
        """Say whether the next token is the likeliest one of the unchanged logits."""
        return self.temperature == 0 and not self.alters


def read_biases(pairs: Sequence[str]) -> dict[int, float]:
    """Parse logit_bias from a command line, such as ["5=-100"]. Raises UserError."""
    try:
        return {int(token): float(bias) for token, bias in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise UserError(f"logit_bias is {' '.join(pairs)!r}, expected TOKEN=BIAS, such as 5=-100") from None


class Draw(NamedTuple):
    """Says how one token is drawn: settings of Sampling, and a random number u in [0, 1)."""

    temperature: float
    top_p: float
    top_k: int
    u: float
    min_p: float = 0.0


def penalized(logits: Tensor, cells: Tensor | tuple[Tensor, Tensor], penalty: float | Tensor) -> Tensor:
    """Return logits with the repetition penalty applied to some cells.

    cells: tokens int64 [n] of logits [V], or rows and tokens int64 [n] of logits [B, V]; penalty: one number, or [n].
    """
    before, after = logits[cells], logits.clone()
    after[cells] = torch.where(before > 0, before / penalty, before * penalty)
    return after


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, u: Tensor, min_p: Tensor | None = None
) -> Tensor:
    """Return token ids int64 [B] of logits [B, V], each by its own settings [B] of Sampling and a number u in [0, 1).

    The token is the one at u · total in the remaining probabilities' cumulative sum, likeliest first, so that it does
    not depend on other rows and is the same on every device. Nothing waits for the GPU.
    """
    hot = torch.where(temperature > 0, temperature, 1.0).clamp(min=1e-6)  # logits divided by less may be infinite
    probability, token = (logits.float() / hot[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = ((rank < top_k[:, None]) | (top_k[:, None] == 0)) & (probability > 0)
    first_k = probability * keep
    upto = first_k.cumsum(-1)
    total = torch.where(top_k == 0, 1.0, upto[:, -1])[:, None]
    keep = keep & (upto - first_k < top_p[:, None] * total)
    if min_p is not None:
        keep = keep & (probability >= min_p[:, None] * probability[:, :1])
    upto = (probability * keep).cumsum(-1)
    # Rounding can put u · total at or above the last sum, because u may be 1 in fp32: then the last kept token, whose
    # probability is above 0, is drawn. If none is kept, as with NaN or a top_p that is 0 in fp32, the first token is.
    place = (upto <= (u * upto[:, -1])[:, None]).sum(-1).clamp(max=keep.sum(-1) - 1).clamp(min=0)
    place = torch.where(temperature > 0, place, 0)
    return token.gather(-1, place[:, None])[:, 0]
