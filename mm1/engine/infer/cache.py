"""Cache keys and values in pages of PAGE tokens, and keep full pages as a prefix cache.

A full page of a prompt or a generated text is registered under a name, the hash of its token ids, of the views of media
in it (kind and values) and of the name of the page before it. A later prompt that begins the same shares these pages.
Registered pages without a user are evicted when pages are needed, the least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.engine.layers.config import Decoder
from mm1.errors import UserError
from mm1.kernels.attention import Causal, attention, paged_attention
from mm1.kernels.dispatch import cdiv

PAGE = 16


class Rows(NamedTuple):
    """Hold the new rows of B documents in one forward pass."""

    cu_seqlens: Tensor  # int32 [B + 1]
    tables: Tensor  # int32 [B, M], the pages of each document
    lengths: Tensor  # int32 [B], rows of each document including the new ones
    slots: Tensor  # int64 [T], place of each new row among all pages' tokens
    max_new_rows: int  # the largest number of new rows of one document
    has_cached_rows: bool  # whether some documents have cached rows before the new ones


class Cache:
    """Allocate `pages` pages to documents: those of the prompt at first, and one more whenever the last one is full.

    Raises UserError if the device has no memory for them.
    """

    def __init__(self, c: Decoder, pages: int, device: torch.device, dtype: torch.dtype):
        shape = (c.layers, pages, PAGE, c.kv_heads, c.head_width)
        try:
            self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; a CPU's errors have no class of their own
            if not any(
                text in str(error) for text in ("out of memory", "allocate memory", "size calculation overflow")
            ):
                raise
            raise UserError(f"no memory for a cache of {pages * PAGE} tokens ({error})") from None
        self.pages = pages
        self.users = [0] * pages  # documents that use each page
        self.free = bytearray(b"\1") * pages  # 1 where a page is free: contiguous pages are found by a search for bytes
        self.free_count = pages
        self.cursor = 0  # the search for the next document's run begins here
        self.released = 0  # pages that became free or idle since the beginning
        self.page_of: dict[bytes, int] = {}  # registered pages by their names
        self.name_of: dict[int, bytes] = {}  # and their names
        self.idle: OrderedDict[int, None] = OrderedDict()  # registered pages without a user, least recently used first

    @property
    def available(self) -> int:
        """Return the number of pages that can be allocated."""
        return self.free_count + len(self.idle)

    def allocate(self, count: int, shared: Sequence[int] = (), *, leave: int = 0, ahead: int = 0) -> list[int] | None:
        """Return `count` pages for a document that begins with the pages `shared`, None if fewer than `leave` remain.

        New pages are contiguous where possible. The next document's pages begin after space for this one to grow to
        `ahead` pages.
        """
        fresh = count - len(shared)
        if fresh + leave > self.available - sum(page in self.idle for page in shared):
            return None
        for page in shared:
            self.users[page] += 1
            self.idle.pop(page, None)
        self._evict(fresh)
        new = self._run(fresh)
        if new:
            self.cursor = new[-1] + 1 + max(ahead - count, 0)
        for page in new:
            self.users[page] = 1
            self._mark(page, free=False)
        return [*shared, *new]

    def extend(self, last: int) -> int | None:
        """Return one more page for a document whose last page is `last`, if possible the next one; None if full."""
        if not self.available:
            return None
        self._evict(1)
        page = last + 1 if last + 1 < self.pages and self.free[last + 1] else self._run(1)[0]
        self.users[page] = 1
        self._mark(page, free=False)
        return page

    def _mark(self, page: int, free: bool) -> None:
        self.free_count += free - self.free[page]
        self.free[page] = free

    def _evict(self, count: int) -> None:
        """Evict idle pages until `count` pages are free."""
        for _ in range(count - self.free_count):
            page, _ = self.idle.popitem(last=False)
            del self.page_of[self.name_of.pop(page)]
            self._mark(page, free=True)

    def _run(self, count: int) -> list[int]:
        """Return contiguous free pages, or else any free pages."""
        run = b"\1" * count
        at = self.free.find(run, self.cursor)
        at = self.free.find(run) if at < 0 else at
        return list(range(at, at + count)) if at >= 0 else np.flatnonzero(self.free)[:count].tolist()

    def release(self, pages: Sequence[int]) -> None:
        """Release the pages of a document: registered ones become idle when their last user releases them."""
        for page in reversed(pages):  # first pages are evicted last: a prefix without its first page is of no use
            self.users[page] -= 1
            if not self.users[page]:
                self.released += 1
                if page in self.name_of:
                    self.idle[page] = None
                else:
                    self._mark(page, free=True)

    def count_registered(self, names: Sequence[bytes], previous: int) -> int:
        """Return how many of these names, from the first on, are registered. previous: the result of the last call.

        The time depends only on the difference to `previous`, because a prefix loses its last pages first.
        """
        count = previous if 0 < previous <= len(names) and names[previous - 1] in self.page_of else 0
        while count < len(names) and names[count] in self.page_of:
            count += 1
        return count

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Return the pages with these names, up to the first name that is not registered."""
        return [self.page_of[name] for name in takewhile(self.page_of.__contains__, names)]

    def register(self, pages: Sequence[int], names: Sequence[bytes]) -> None:
        """Register full pages under their names, except for those whose name another page has."""
        for page, name in zip(pages, names):
            if name not in self.page_of:
                self.page_of[name], self.name_of[page] = page, name

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values between pages, each pair (source, target); no page is both."""
        if pairs:
            source, target = torch.tensor(pairs, device=self.k.device).unbind(1)
            for cached in (self.k, self.v):
                cached.index_copy_(1, target, cached.index_select(1, source))

    def clear(self) -> None:
        """Drop the prefix cache: free idle pages; pages in use stay with their users, unregistered."""
        for page in self.idle:
            self._mark(page, free=True)
        self.page_of, self.name_of = {}, {}
        self.idle.clear()

    def attends(self, rows: Rows) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Return each layer's attention function of q, k and v of the new rows."""
        return [partial(_attend, keys, values, rows) for keys, values in zip(self.k.unbind(), self.v.unbind())]

    def rows(self, tables: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> Rows:
        """Return the Rows of a forward pass over rows `starts` to `ends` of the documents whose pages are `tables`."""
        device, width = self.k.device, max(map(len, tables), default=0)
        table = np.zeros((len(tables), width), np.int32)
        for b, pages in enumerate(tables):
            table[b, : len(pages)] = pages
        slots = [table[b, np.arange(s, e) // PAGE].astype(np.int64) * PAGE + np.arange(s, e) % PAGE
                 for b, (s, e) in enumerate(zip(starts, ends))]  # fmt: skip
        new = [end - start for start, end in zip(starts, ends)]
        flat = np.concatenate([np.empty(0, np.int64), *slots])
        arrays = (np.cumsum([0, *new], dtype=np.int32), table, np.array(ends, np.int32), flat)
        cu_seqlens, table, lengths, flat = (torch.from_numpy(x).to(device) for x in arrays)
        return Rows(cu_seqlens, table, lengths, flat, max(new, default=0), any(starts))


def _attend(keys: Tensor, values: Tensor, rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Store k and v [T, G, Dh] of the new rows, and return their causal attention over all of their documents.

    q and the result [T, H, Dh].
    """
    keys.flatten(0, 1).index_copy_(0, rows.slots, k)
    values.flatten(0, 1).index_copy_(0, rows.slots, v)
    if not rows.has_cached_rows:
        return attention(q, k, v, rows.cu_seqlens, mask=Causal(), max_length=rows.max_new_rows)
    return paged_attention(q, keys, values, rows.cu_seqlens, rows.tables, rows.lengths, rows=rows.max_new_rows)


def page_names(tokens: np.ndarray, digests: Sequence[bytes], image_id: int, slots: int) -> list[bytes]:
    """Return the names of a prompt's full pages, except for a last one that ends with the prompt.

    digests: of its views of media (record.view_digest). image_id: the token of a medium's slot; each view has `slots`
    of them, 0 where the model takes text alone.
    """
    names, name, slots = [], b"", max(slots, 1)
    counts = np.cumsum(tokens == image_id)  # slots of media up to each row
    for start in range(0, len(tokens) - PAGE, PAGE):
        first, last = int(counts[start - 1] if start else 0) // slots, cdiv(int(counts[start + PAGE - 1]), slots)
        name = page_name(name, tokens[start : start + PAGE], digests[first:last])
        names.append(name)
    return names


def page_name(previous: bytes, tokens: np.ndarray, digests: Sequence[bytes]) -> bytes:
    """Return the name of the page after the page named `previous`: of its tokens and of the views with slots in it."""
    return hashlib.sha256(previous + np.asarray(tokens, np.int32).tobytes() + b"".join(digests)).digest()
