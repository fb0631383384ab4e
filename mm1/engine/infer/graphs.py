"""Run a decoding step on a GPU as one CUDA graph of compiled blocks and sampling.

A graph is captured when its batch size, a power of two, first occurs; unused rows use a page of their own. If the CPU
launched them one by one, the few hundred kernels of a step would take longer than reading the weights does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mm1.engine.infer.cache import PAGE, Cache, Rows
from mm1.engine.infer.sampler import draw_tokens
from mm1.engine.infer.sampling import GREEDY, Draw
from mm1.engine.layers.blocked import twin
from mm1.kernels.dispatch import power_of_2
from mm1.kernels.fallback import plain_calls

PAGES = 512  # limit of a text's pages, so that all tables have one shape; longer texts are decoded without a graph


class Captured(NamedTuple):
    """Hold a captured graph with its static inputs and outputs."""

    graph: "torch.cuda.CUDAGraph | Stepwise"
    whole: Tensor  # int32 [B, 2 + PAGES]: token, position, pages
    draws: Tensor  # fp32 [B, fields of Draw]
    logits: Tensor  # fp32 [B, V]
    chosen: Tensor  # fp64 [B, 2]: token, its log-probability


class Stepwise(NamedTuple):
    """Stand for the graph of a step that cannot be captured: ops in plain torch read sizes on the host."""

    step: Callable[[], tuple[Tensor, Tensor]]
    results: tuple[Tensor, Tensor]

    def replay(self) -> None:
        """Run the step, and store what it returns in the results."""
        for kept, new in zip(self.results, self.step()):
            kept.copy_(new)


class Graphs:
    """Decode with a decoder, its head and a cache on a GPU, for at most `batch` texts at once."""

    def __init__(self, decoder: Any, head: nn.Module, cache: Cache, batch: int):
        self.decoder, self.head, self.cache = twin(decoder), head, cache
        self._compile()
        spare = cache.allocate(1)
        assert spare, "a cache of no pages"
        self.spare, self.captured, self.pool = spare[0], {}, None
        self.whole = np.zeros((power_of_2(batch), 2 + PAGES), np.int32)

    def _compile(self) -> None:
        for block in self.decoder.blocks:
            block.replace_forward(torch.compile(block.forward, fullgraph=True))  # pyright: ignore[reportCallIssue]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the graphs, which belong to this process. A copy captures its own."""
        return {**self.__dict__, "captured": {}, "pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[np.ndarray], draws: Sequence[Draw]
    ) -> tuple[Tensor, list[int], list[float]]:
        """Return logits fp32 [B, V] after one token of each of B texts, the next tokens and their log-probabilities.

        positions: of the tokens in their texts; tables int32: the pages of each text, at most PAGES, including the
        page of the new row.
        """
        count, sampled = len(tokens), any(draw.temperature for draw in draws)
        key = (power_of_2(count), sampled)
        if key not in self.captured:
            self.captured[key] = self._capture(*key)
        c = self.captured[key]
        c.whole.copy_(torch.from_numpy(self.inputs(key[0], tokens, positions, tables)))
        if sampled:
            c.draws[:count].copy_(torch.tensor(draws, dtype=torch.float32))
        c.graph.replay()
        chosen = c.chosen[:count].tolist()
        return c.logits[:count], [int(token) for token, _ in chosen], [logprob for _, logprob in chosen]

    def inputs(
        self, size: int, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return a graph's input int32 [size, 2 + PAGES]: token, position and pages; unused rows use the spare page."""
        whole = self.whole[:size]
        whole[:, :2], whole[:, 2] = 0, self.spare
        whole[: len(tokens), 0], whole[: len(tokens), 1] = tokens, positions
        for row, table in zip(whole, tables):
            row[2 : 2 + len(table)] = table
        return whole

    def step(self, whole: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `logits` and `chosen` of Captured; without draws the likeliest tokens. Does not synchronize."""
        positions, tables = whole[:, 1].long(), whole[:, 2:]
        slots = tables.gather(1, positions[:, None] // PAGE)[:, 0].long() * PAGE + positions % PAGE
        cu_seqlens = torch.arange(len(whole) + 1, dtype=torch.int32, device=whole.device)
        rows = Rows(cu_seqlens, tables, positions.int() + 1, slots, max_new_rows=1, has_cached_rows=True)
        x = self.decoder.embedding(whole[:, 0])
        # All engines of a process share Block.forward's code; each compiles four or five versions, and torch allows 8.
        with torch._dynamo.config.patch(recompile_limit=64):
            hidden = self.decoder(x, positions, cu_seqlens, attends=self.cache.attends(rows))[0]
        logits = self.head(hidden).float()
        tokens = logits.argmax(-1) if draws is None else draw_tokens(logits, draws)
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return logits, torch.stack([tokens.double(), logprobs.double()], 1)

    def _capture(self, size: int, sampled: bool) -> Captured:
        device = self.cache.k.device
        whole = torch.from_numpy(self.inputs(size, [], [], [])).to(device)
        draws = torch.tensor([GREEDY] * size, dtype=torch.float32, device=device)
        step = partial(self.step, whole, draws if sampled else None)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = plain_calls()
            step()  # compiles, and chooses kernels
            results = step()
        torch.cuda.current_stream().wait_stream(stream)
        if plain_calls() > before:
            return Captured(Stepwise(step, results), whole, draws, *results)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits, chosen = step()
        self.pool = graph.pool()  # graphs that are replayed one at a time can share memory
        return Captured(graph, whole, draws, logits, chosen)
