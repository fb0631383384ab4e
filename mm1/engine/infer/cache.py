"""Keys and values of every layer in pages of PAGE tokens: who has which, and what one forward sees of them.

Full pages, of prompts and of what was generated, stay known by what they hold, token ids and contents of images alike,
and by all before them: a later prompt that begins the same shares them. Known pages that nobody uses any more are
evicted when pages are needed, least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
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
    """New rows of B documents in one forward. behind: some have more before them than they bring."""

    cu_seqlens: Tensor  # int32 [B + 1]
    tables: Tensor  # int32 [B, M]
    lengths: Tensor  # int32 [B], with the new rows
    slots: Tensor  # int64 [T], place of each new row among all pages' tokens
    most: int  # new rows of one document
    behind: bool


class Cache:
    """Allocates `pages` pages. A document takes those of its prompt, and one more whenever it has filled its last."""

    def __init__(self, c: Decoder, pages: int, device: torch.device, dtype: torch.dtype):
        shape = (c.layers, pages, PAGE, c.kv_heads, c.head_width)
        try:
            self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        except RuntimeError as error:
            raise UserError(f"no memory for a cache of {pages * PAGE} tokens ({error})") from None
        self.pages = pages
        self.users = [0] * pages
        self.free = bytearray(b"\1") * pages  # 1 where a page is free: runs are found by a search for bytes
        self.empty = pages  # free pages
        self.cursor = 0  # where a run for the next document is looked for
        self.dropped = 0  # pages that became free or idle, since the beginning
        self.known: dict[bytes, int] = {}  # page by what it and all before it hold
        self.names: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # known pages without a user, last used last

    @property
    def room(self) -> int:
        """Return how many pages can be taken."""
        return self.empty + len(self.idle)

    def take(self, count: int, shared: Sequence[int] = (), *, leave: int = 0, ahead: int = 0) -> list[int] | None:
        """Allocate `count` pages for a document that begins with `shared` ones; None where fewer than `leave` would
        remain. They lie side by side if they can, with `ahead` pages for all before the next document's begin.
        """
        fresh = count - len(shared)
        if fresh + leave > self.room - sum(page in self.idle for page in shared):
            return None
        for page in shared:
            self.users[page] += 1
            self.idle.pop(page, None)
        self._evict(fresh)
        taken = self._run(fresh)
        if taken:
            self.cursor = taken[-1] + 1 + max(ahead - count, 0)
        for page in taken:
            self._use(page)
        return [*shared, *taken]

    def grow(self, last: int) -> int | None:
        """Allocate one page more for a document whose last page is `last`: the next one if it is free."""
        if not self.room:
            return None
        self._evict(1)
        page = last + 1 if last + 1 < self.pages and self.free[last + 1] else self._run(1)[0]
        self._use(page)
        return page

    def _evict(self, count: int) -> None:
        """Forget known pages until so many are free."""
        while self.empty < count:
            page, _ = self.idle.popitem(last=False)
            del self.known[self.names.pop(page)]
            self._release(page)

    def _run(self, count: int) -> list[int]:
        """Return free pages side by side, or else any."""
        run = b"\1" * count
        at = self.free.find(run, self.cursor)
        at = self.free.find(run) if at < 0 else at
        return list(range(at, at + count)) if at >= 0 else np.flatnonzero(self.free)[:count].tolist()

    def _use(self, page: int) -> None:
        self.users[page] += 1
        self.free[page] = 0
        self.empty -= 1

    def _release(self, page: int) -> None:
        self.free[page] = 1
        self.empty += 1

    def drop(self, pages: Sequence[int]) -> None:
        """Take note that a document is done with its pages."""
        for page in reversed(pages):  # a beginning without its first page is of no use
            self.users[page] -= 1
            if not self.users[page]:
                self.dropped += 1
                if page in self.names:
                    self.idle[page] = None
                else:
                    self._release(page)

    def known_of(self, names: Sequence[bytes], before: int) -> int:
        """Return how many of these names, from the first on, are known. before: how many were when last asked.

        Only what has changed takes time: a prefix loses its last pages first.
        """
        count = before if before <= len(names) and before and names[before - 1] in self.known else 0
        while count < len(names) and names[count] in self.known:
            count += 1
        return count

    def shared(self, names: Sequence[bytes]) -> list[int]:
        """Pages that hold the beginning of what these are the names of."""
        found = []
        for name in names:
            if name not in self.known:
                break
            found.append(self.known[name])
        return found

    def remember(self, pages: Sequence[int], names: Sequence[bytes]) -> None:
        """What these pages hold by now; one whose name is taken already stays unknown."""
        for page, name in zip(pages, names):
            if name not in self.known:
                self.known[name], self.names[page] = page, name

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values of pages, (from, to); none is both."""
        if pairs:
            source, target = torch.tensor(pairs, device=self.k.device).unbind(1)
            for held in (self.k, self.v):
                held.index_copy_(1, target, held.index_select(1, source))

    def forget(self) -> None:
        """Forget what pages hold; those in use stay with their users."""
        for page in self.idle:
            self._release(page)
        self.known, self.names = {}, {}
        self.idle.clear()

    def attends(self, rows: Rows) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """A layer's attention, by layers."""
        return [partial(_attend, keys, values, rows) for keys, values in zip(self.k.unbind(), self.v.unbind())]

    def rows(self, tables: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> Rows:
        """Of documents whose pages are `tables`, the rows from `starts` to `ends`."""
        device, most = self.k.device, max(map(len, tables), default=0)
        table = np.zeros((len(tables), most), np.int32)
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
    """New rows q [T, H, Dh], k and v [T, G, Dh] are kept, and see all of their document up to themselves."""
    keys.flatten(0, 1).index_copy_(0, rows.slots, k)
    values.flatten(0, 1).index_copy_(0, rows.slots, v)
    if not rows.behind:
        return attention(q, k, v, rows.cu_seqlens, mask=Causal())
    return paged_attention(q, keys, values, rows.cu_seqlens, rows.tables, rows.lengths, rows=rows.most)


def names(tokens: np.ndarray, digests: Sequence[bytes], image_id: int, slots: int) -> list[bytes]:
    """Return names of a prompt's full pages, but of one that ends with it: what each and all before it hold.

    digests: of its images.
    """
    found, name = [], b""
    images = np.cumsum(tokens == image_id)  # tokens of images up to each row
    for start in range(0, len(tokens) - PAGE, PAGE):
        first, last = (int(images[start - 1]) if start else 0) // slots, cdiv(int(images[start + PAGE - 1]), slots)
        name = page_name(name, tokens[start : start + PAGE], digests[first:last])
        found.append(name)
    return found


def page_name(before: bytes, tokens: np.ndarray, digests: Sequence[bytes]) -> bytes:
    """Return the name of a page of these tokens behind the page named `before`, with a part of these images."""
    return hashlib.sha256(before + np.asarray(tokens, np.int32).tobytes() + b"".join(digests)).digest()
