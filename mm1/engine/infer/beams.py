"""Search with beams: keep the hypotheses of one request, and the pages of the cache that its live beams use.

A hypothesis of n new tokens has the score  Σ log-probability / n^length_penalty. The rules are those of transformers'
generate (5.23), so that the same logits give the same tokens:

- A step takes the 2 · num_beams likeliest continuations of all live beams. Those of the first num_beams that end are
  finished; the first num_beams that do not end stay live. At max_tokens every hypothesis ends.
- The num_beams finished hypotheses with the best scores are kept. The search is over when there are num_beams of them
  and early_stopping is True, or the likeliest live beam would not beat the worst of them at its current length (with
  early_stopping "never" and length_penalty > 0: at max_tokens).

Beams share the prompt's full pages and all full pages of their common tokens. If two beams continue on the same partly
filled page, it is copied; nothing else in the cache moves.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.sampling import Sampling
from mm1.kernels.dispatch import cdiv

Tokens = tuple[int, ...]


class Beam(NamedTuple):
    """Hold one hypothesis: its new tokens, and the pages of its keys and values."""

    tokens: Tokens
    logprobs: tuple[float, ...]
    total: float  # sum of logprobs
    table: np.ndarray  # int32: pages of the prompt and the tokens


def pages_needed(prompt: int, sampling: Sampling) -> int:
    """Return the largest number of pages that a prompt of `prompt` tokens and all its beams need.

    The last token of a text is not computed, so it needs no row.
    """
    full = prompt // PAGE
    own = cdiv(prompt + max(sampling.max_tokens - 1, 0), PAGE) - full
    return full + sampling.num_beams * own


def max_length(prompt: int, beams: int, pages: int) -> int:
    """Return how many tokens a prompt of `prompt` tokens and one of its beams can have together on `pages` pages.

    Beams share the prompt's full pages.
    """
    full = prompt // PAGE
    return (full + (pages - full) // beams) * PAGE


class Beams:
    """Search for the best continuation of one prompt.

    prompt: number of its tokens. pages: all pages that the search may use, the prompt's first. ends: returns whether a
    hypothesis is complete, by end-of-text or a stop string.
    """

    def __init__(self, prompt: int, pages: Sequence[int], sampling: Sampling, ends: Callable[[Tokens], bool]):
        self.prompt, self.sampling, self.ends = prompt, sampling, ends
        self.live = [Beam((), (), 0.0, np.array(pages[: cdiv(prompt, PAGE)], np.int32))]
        self.finished: list[tuple[float, Beam]] = []  # scores and hypotheses, best first
        self.pool = list(pages[prompt // PAGE :])
        self.done = False

    @property
    def best(self) -> Beam:
        """Return the finished hypothesis with the best score, or the likeliest live one if none is finished."""
        return self.finished[0][1] if self.finished else self.live[0]

    def advance(self, logprobs: np.ndarray, tokens: np.ndarray) -> list[tuple[int, int]]:
        """Take a step; return the pages to copy as pairs (source, target).

        logprobs, tokens [live, ≥ 2 · num_beams]: the likeliest next tokens of each live beam, likeliest first.
        """
        sampling, n = self.sampling, self.sampling.num_beams
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
            if length < sampling.max_tokens and not self.ends(child.tokens):
                children.append((i, child))
            elif rank < n:
                self.finished.append((total / length**sampling.length_penalty, child))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:n]
        self.done = not children or self._is_over(children[0][1].total, length)
        return [] if self.done else self._assign_pages(children[:n])

    def _is_over(self, likeliest: float, length: int) -> bool:
        """Return whether the search ends by the second rule. likeliest: log-probability of the best live beam."""
        sampling = self.sampling
        if len(self.finished) < sampling.num_beams:
            return False
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            length = sampling.max_tokens
        return sampling.early_stopping is True or likeliest / length**sampling.length_penalty <= self.finished[-1][0]

    def _assign_pages(self, children: Sequence[tuple[int, Beam]]) -> list[tuple[int, int]]:
        """Make the children live. A parent's first child keeps its partly filled page; its other children copy it."""
        page, inside = divmod(self.prompt + len(children[0][1].tokens) - 1, PAGE)  # the place of the next row
        parents = [i for i, _ in children]
        keeps = [inside > 0 and i not in parents[:rank] for rank, i in enumerate(parents)]
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
