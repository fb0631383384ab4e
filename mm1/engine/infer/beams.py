"""Beam search: the hypotheses of one request, and which pages of the cache its live beams use.

A hypothesis of n new tokens has the score  Σ log-probability / n^length_penalty. The rules are those of transformers'
generate (5.23), so that the same logits give the same tokens:

- Each step takes the 2 · num_beams likeliest continuations of all live beams. Those among the first num_beams that end
  are finished; the first num_beams that do not end live on. At max_tokens every one ends.
- The num_beams finished ones with the best scores are kept. The search is over once there are num_beams of them and
  early_stopping is True, or the likeliest live beam would not beat the worst of them at its present length, or, with
  early_stopping "never" and length_penalty > 0, at max_tokens.

Beams share the prompt's full pages and all full pages of the tokens they have in common. A page that two beams go on
writing to is copied; nothing else of the cache moves.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.sampling import Sampling
from mm1.kernels.dispatch import cdiv

Tokens = tuple[int, ...]


class Beam(NamedTuple):
    """Is one hypothesis: its new tokens, and where its keys and values are."""

    tokens: Tokens
    logprobs: tuple[float, ...]
    total: float  # sum of logprobs
    table: np.ndarray  # int32: pages with the prompt and the tokens


def pages_of(prompt: int, sampling: Sampling) -> int:
    """Return how many pages a prompt of so many tokens and all its beams need at most. The last token needs no row."""
    full = prompt // PAGE
    own = cdiv(prompt + max(sampling.max_tokens - 1, 0), PAGE) - full
    return full + sampling.num_beams * own


def tokens_of(prompt: int, beams: int, pages: int) -> int:
    """Return how many tokens of a prompt and one of its beams fit so many pages, of which beams share the full ones of
    the prompt."""
    full = prompt // PAGE
    return (full + (pages - full) // beams) * PAGE


class Beams:
    """Searches the continuations of one prompt.

    prompt: its tokens. pages: all that it may use, the prompt's first. ends: whether a hypothesis is complete, by an
    end token or a stop string.
    """

    def __init__(self, prompt: int, pages: Sequence[int], sampling: Sampling, ends: Callable[[Tokens], bool]):
        self.prompt, self.sampling, self.ends = prompt, sampling, ends
        self.live = [Beam((), (), 0.0, np.array(pages[: cdiv(prompt, PAGE)], np.int32))]
        self.finished: list[tuple[float, Beam]] = []  # with their scores, best first
        self.pool = list(pages[prompt // PAGE :])
        self.done = False

    @property
    def best(self) -> Beam:
        """Return the finished one with the best score, or else the likeliest live one."""
        return self.finished[0][1] if self.finished else self.live[0]

    def advance(self, logprobs: np.ndarray, tokens: np.ndarray) -> list[tuple[int, int]]:
        """Take the next step; return the pages to copy, each with the page that it is copied to.

        logprobs, tokens [live, ≥ 2 · num_beams]: of the likeliest next tokens of each live beam, likeliest first.
        """
        how, n = self.sampling, self.sampling.num_beams
        candidates = [
            (beam.total + logprob, i, token, logprob)
            for i, beam in enumerate(self.live)
            for token, logprob in zip(tokens[i].tolist(), logprobs[i].tolist())
        ]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * n]
        length = len(self.live[0].tokens) + 1
        children: list[tuple[int, Beam]] = []
        for rank, (total, i, token, logprob) in enumerate(candidates):
            parent = self.live[i]
            child = Beam((*parent.tokens, token), (*parent.logprobs, logprob), total, parent.table)
            if length < how.max_tokens and not self.ends(child.tokens):
                children.append((i, child))
            elif rank < n:
                self.finished.append((total / length**how.length_penalty, child))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:n]
        self.done = not children or self._settled(children[0][1].total, length)
        return [] if self.done else self._go_on(children[:n])

    def _settled(self, likeliest: float, length: int) -> bool:
        """Say whether no live beam can come among the finished ones any more, as far as the rule looks."""
        how = self.sampling
        if len(self.finished) < how.num_beams:
            return False
        at = how.max_tokens if how.early_stopping == "never" and how.length_penalty > 0 else length
        return how.early_stopping is True or likeliest / at**how.length_penalty <= self.finished[-1][0]

    def _go_on(self, children: Sequence[tuple[int, Beam]]) -> list[tuple[int, int]]:
        """Give each child its pages; the first of a parent keeps the page that is half full, the others copy it."""
        page, inside = divmod(self.prompt + len(children[0][1].tokens) - 1, PAGE)  # of the row that comes next
        heirs: set[int] = set()
        keeps: list[bool] = []
        for i, _ in children:
            keeps.append(bool(inside) and i not in heirs)
            heirs.add(i)
        used = {p for (_, beam), keep in zip(children, keeps) for p in beam.table[: page + keep].tolist()}
        free = (p for p in self.pool if p not in used)
        self.live, copies = [], []
        for (_, beam), keep in zip(children, keeps):
            if not keep:
                fresh = next(free)
                if inside:
                    copies.append((int(beam.table[page]), fresh))
                beam = beam._replace(table=np.append(beam.table[:page], np.int32(fresh)))
            self.live.append(beam)
        return copies
