"""Run a decoding step on a GPU as one CUDA graph of compiled blocks and sampling.

There is a graph for each batch size that is a power of two, for texts of up to PAGES pages and for longer ones, with
and without random draws. Engine.warm_up captures them all; one that is needed before is captured then. Unused rows use
a page of their own and no expert. If the CPU launched them one by one, the few hundred kernels of a step would take
longer than reading the weights does.
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
from mm1.engine.layers.generation import PARTS, hidden_states
from mm1.kernels.dispatch import power_of_2
from mm1.kernels.fallback import plain_calls

PAGES = 512  # pages of narrow tables, 8,192 tokens: tables of 65,536 tokens take a megabyte for 64 texts in every step


class Kind(NamedTuple):
    """Identify a graph."""

    size: int  # of the batch
    pages: int  # of each table
    sampled: bool  # whether some texts have a temperature


class Captured(NamedTuple):
    """Hold a captured graph with its static inputs and outputs."""

    graph: "torch.cuda.CUDAGraph | Stepwise"
    whole: Tensor  # int32 [B, 2 + pages]: token, position, pages
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
    """Decode with a decoder, its head and a cache on a GPU, for at most `batch` texts at once.

    longest: limit of a text's pages (default: all pages of the cache). kinds: those of all graphs, in the order that
    compiles least code and then shares most memory. device: that of the cache, whatever the current device is.
    """

    def __init__(self, decoder: Any, head: nn.Module, cache: Cache, batch: int, longest: int | None = None):
        self.decoder, self.head, self.cache, self.device = decoder, head, cache, cache.k.device
        self._compile()
        spare = cache.allocate(1)
        assert spare, "a cache of no pages"
        self.spare, self.captured, self.pool = spare[0], {}, None
        largest, longest = power_of_2(batch), longest or cache.pages
        self.whole = np.zeros((largest, 2 + longest), np.int32)
        self.widths = sorted({min(PAGES, longest), longest})
        sizes = [1, *(largest >> i for i in range(largest.bit_length() - 1))]
        self.kinds = [Kind(n, w, sampled) for n in sizes for w in reversed(self.widths) for sampled in (True, False)]

    def _compile(self) -> None:
        self.parts = [torch.compile(part, fullgraph=True) for part in PARTS]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without code and graphs, which belong to this process. A copy makes its own."""
        return {**self.__dict__, "captured": {}, "pool": None, "parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[np.ndarray], draws: Sequence[Draw]
    ) -> tuple[Tensor, list[int], list[float]]:
        """Return logits fp32 [B, V] after one token of each of B texts, the next tokens and their log-probabilities.

        positions: of the tokens in their texts; tables int32: the pages of each text, including the page of the new
        row.
        """
        count, longest = len(tokens), max(map(len, tables))
        pages = next(width for width in self.widths if width >= longest)
        kind = Kind(power_of_2(count), pages, any(draw.temperature for draw in draws))
        c = self.capture(kind)
        c.whole.copy_(torch.from_numpy(self.inputs(kind, tokens, positions, tables)))
        if kind.sampled:
            c.draws[:count].copy_(torch.tensor(draws, dtype=torch.float32))
        c.graph.replay()
        chosen = c.chosen[:count].tolist()
        return c.logits[:count], [int(token) for token, _ in chosen], [logprob for _, logprob in chosen]

    def inputs(
        self, kind: Kind, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return a graph's input int32 [size, 2 + pages]: token, position and pages; unused rows use the spare page."""
        whole = self.whole[: kind.size, : 2 + kind.pages]
        whole[:, :2], whole[:, 2] = 0, self.spare
        whole[: len(tokens), 0], whole[: len(tokens), 1] = tokens, positions
        for row, table in zip(whole, tables):
            row[2 : 2 + len(table)] = table
        return whole

    def step(self, whole: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `logits` and `chosen` of Captured; without draws the likeliest tokens. Does not synchronize."""
        positions, tables = whole[:, 1].long(), whole[:, 2:].contiguous()  # once, not in each layer
        slots = tables.gather(1, positions[:, None] // PAGE)[:, 0].long() * PAGE + positions % PAGE
        cu_seqlens = torch.arange(len(whole) + 1, dtype=torch.int32, device=whole.device)
        rows = Rows(cu_seqlens, tables, positions.int() + 1, slots, max_new_rows=1, has_cached_rows=True)
        x = self.decoder.embedding(whole[:, 0])
        # All engines of a process share the code of PARTS. An engine compiles two versions of each function, a mixture
        # four of the second, and torch allows 8 of a function.
        with torch._dynamo.config.patch(recompile_limit=64):
            hidden = hidden_states(
                self.decoder, x, positions, self.cache.attends(rows), mask=tables[:, 0] != self.spare,
                parts=self.parts,
            )  # fmt: skip
        logits = self.head(hidden).float()
        tokens = logits.argmax(-1) if draws is None else draw_tokens(logits, draws)
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return logits, torch.stack([tokens.double(), logprobs.double()], 1)

    def capture(self, kind: Kind) -> Captured:
        """Return the graph of this kind, which is captured if it was not yet."""
        if kind not in self.captured:
            self.captured[kind] = self._capture(kind)
        return self.captured[kind]

    def _static_inputs(self, kind: Kind) -> tuple[Tensor, Tensor]:
        """Return `whole` and `draws` of Captured, of which no row is used yet."""
        whole = torch.from_numpy(self.inputs(kind, [], [], []).copy()).to(self.device)
        return whole, torch.tensor([GREEDY] * kind.size, dtype=torch.float32, device=self.device)

    def _capture(self, kind: Kind) -> Captured:
        whole, draws = self._static_inputs(kind)
        step = partial(self.step, whole, draws if kind.sampled else None)
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                before = plain_calls()
                step()  # compiles, and chooses kernels
                results = step()
            current.wait_stream(stream)
            if plain_calls() > before:
                return Captured(Stepwise(step, results), whole, draws, *results)
            graph = torch.cuda.CUDAGraph()
            # Without `stream`, torch captures on a stream of the first device that captured in this process.
            # "thread_local": other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                logits, chosen = step()
        self.pool = graph.pool()  # graphs that are replayed one at a time can share memory
        return Captured(graph, whole, draws, logits, chosen)
