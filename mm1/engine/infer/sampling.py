"""Define the sampling settings of a request.

To add a setting, add a field with its range and help text to Sampling: `generate` and the command `mm1 generate` then
take it. Its effect belongs in sampler.py: in `_adjusted` if it changes logits, or else as a field of Draw that
`draw_tokens` obeys. Over HTTP a setting also needs its range in serve/fields.py and a line in docs/serve.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from mm1.engine.infer.grammar import Grammar
from mm1.engine.settings import Count, CountOrZero, Range, hints
from mm1.errors import UserError, require

TOP_LOGPROBS = 20  # limit of alternatives to a token
LARGEST = 1e6  # limit of numbers that change logits: those must stay finite in fp32 to be sampled from
Penalty = Annotated[float, Range(minimum=-LARGEST, maximum=LARGEST)]


class Draw(NamedTuple):
    """Hold the settings by which one token is drawn, and a random number u in [0, 1)."""

    temperature: float
    top_p: float
    top_k: int
    u: float
    min_p: float = 0.0


GREEDY = Draw(0.0, 1.0, 0, 0.0)


@dataclass(frozen=True)
class Sampling:
    """Define how the tokens of a text are chosen and when it ends. Raises UserError for a value outside its range.

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

    top_logprobs: number of alternatives that are recorded for each token. Log-probabilities are the model's own, before
    all of these steps. num_beams > 1 returns the text that beam search scores best (beams.py): its log-probability
    divided by length^length_penalty. early_stopping: when the search ends, as in transformers.
    """

    max_tokens: CountOrZero = 64
    "tokens to generate at most; the text ends earlier where prompt and text reach the model's context."
    temperature: Annotated[float, Range(minimum=0, maximum=LARGEST)] = 0.0
    "divide logits by this before a token is drawn; 0: always take the most likely token (greedy)."
    top_p: Annotated[float, Range(minimum=1 / LARGEST, maximum=1)] = 1.0
    "sample only from the most likely tokens whose probabilities sum to this, 0 to 1; 1: no limit."
    top_k: Annotated[int, Range(minimum=0, maximum=1 << 24)] = 0
    "sample only from the k most likely tokens; 0: no limit."
    repetition_penalty: Annotated[float, Range(minimum=1 / LARGEST, maximum=LARGEST)] = 1.0
    """divide the positive logits of tokens that are in the prompt or the text by this, and multiply the negative ones;
    1: none."""
    stop: str | Sequence[str] = ()
    "end the text before this string."
    seed: int | None = None
    "seed of the sampling (default: another one each time)."
    num_beams: Count = 1
    "texts that beam search keeps; 1: no beam search."
    # With steeper penalties length^length_penalty may be infinite, or a score rounded to zero.
    length_penalty: Annotated[float, Range(minimum=-10, maximum=10)] = 1.0
    """beam search divides a text's log-probability by its length to the power of this, -10 to 10; above 0 favours long
    texts."""
    early_stopping: bool | Literal["never"] = False
    min_p: Annotated[float, Range(minimum=0, maximum=1)] = 0.0
    "sample only tokens of at least this fraction of the most likely token's probability, 0 to 1; 0: no limit."
    frequency_penalty: Penalty = 0.0
    "subtract this from a token's logit for each time that it is in the text."
    presence_penalty: Penalty = 0.0
    "subtract this once from the logit of a token that is in the text."
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    "add a number to the logit of the token with this id, such as 5=-100."
    top_logprobs: Annotated[int, Range(minimum=0, maximum=TOP_LOGPROBS)] = 0
    grammar: Grammar | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "logit_bias", tuple(dict(self.logit_bias or ()).items()))  # hashable
        for name, hint in hints(Sampling).items():
            for legal in getattr(hint, "__metadata__", ()):
                require(getattr(self, name) in legal, name, getattr(self, name), str(legal))
        early = self.early_stopping
        require(early in (False, True, "never"), "early_stopping", early, 'False, True or "never"')
        legal_biases = all(token >= 0 and abs(bias) <= LARGEST for token, bias in self.biases)
        expected = f"token ids ≥ 0 and numbers from {-LARGEST} to {LARGEST}"
        require(legal_biases, "logit_bias", dict(self.biases), expected)
        if self.num_beams > 1:
            require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "≥ 1 for a beam search")
            if not (self.plain and self.top_logprobs == 0):
                others = "temperature, penalties, logit_bias, grammar or top_logprobs"
                raise UserError(f"{self.num_beams} beams with {others}, expected either num_beams 1 or none of these")

    @property
    def biases(self) -> Sequence[tuple[int, float]]:
        """Return logit_bias as pairs of token and number."""
        return self.logit_bias  # pyright: ignore[reportReturnType]: it is a tuple of pairs from __post_init__ on

    @property
    def alters(self) -> bool:
        """Return whether any of steps 1 to 4 changes the logits."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or bool(self.logit_bias) or self.grammar is not None

    @property
    def plain(self) -> bool:
        """Return whether the next token is the likeliest one of the unchanged logits."""
        return self.temperature == 0 and not self.alters

    def draw(self, u: float) -> Draw:
        """Return how a token is drawn with the random number u."""
        return Draw(self.temperature, self.top_p, self.top_k, u, self.min_p)


def read_biases(pairs: Sequence[str]) -> dict[int, float]:
    """Parse logit_bias from a command line, such as ["5=-100"]. Raises UserError."""
    try:
        return {int(token): float(bias) for token, bias in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise UserError(f"logit_bias is {' '.join(pairs)!r}, expected TOKEN=BIAS, such as 5=-100") from None
