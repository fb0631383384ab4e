"""Keys and values of every layer in pages of PAGE tokens: who has which, and what one forward sees of them.

A prompt's full pages stay known by what they hold, token ids and contents of images alike, and by all before them: a
later prompt that begins the same shares them. What nobody uses any more is given up, least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.engine import config
from mm1.engine.data.record import DataError
from mm1.kernels.attention import attention
from mm1.kernels.paged import paged_attention

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
    """`pages` pages; a document's are taken when it begins, for all it may become, so that it is never put back."""

    def __init__(self, c: config.Decoder, pages: int, device: torch.device, dtype: torch.dtype):
        shape = (c.layers, pages, PAGE, c.kv_heads, c.head_width)
        try:
            self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        except RuntimeError as error:
            raise DataError(f"no memory for a cache of {pages * PAGE} tokens ({error})") from None
        self.pages = pages
        self.users = [0] * pages
        self.free = list(range(pages))  # in order
        self.known: dict[bytes, int] = {}  # page by what it and all before it hold
        self.names: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # known pages without a user, last used last

    @property
    def room(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.idle)

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """For a document that begins with `shared` ones; None if there are too few. Side by side if it can be."""
        held = sum(page in self.idle for page in shared)
        if count - len(shared) > self.room - held:
            return None
        for page in shared:
            self.users[page] += 1
            self.idle.pop(page, None)
        fresh = count - len(shared)
        while len(self.free) < fresh:
            page, _ = self.idle.popitem(last=False)
            del self.known[self.names.pop(page)]
            self.free = sorted([*self.free, page])
        at = next((i for i in range(len(self.free) - fresh + 1) if self._run(i, fresh)), 0)
        taken, self.free = self.free[at : at + fresh], self.free[:at] + self.free[at + fresh :]
        for page in taken:
            self.users[page] += 1
        return [*shared, *taken]

    def _run(self, at: int, count: int) -> bool:
        return not count or self.free[at + count - 1] - self.free[at] == count - 1

    def drop(self, pages: Sequence[int]) -> None:
        """A document is done with them."""
        gone = []
        for page in reversed(pages):  # a beginning without its first page is of no use
            self.users[page] -= 1
            if not self.users[page]:
                if page in self.names:
                    self.idle[page] = None
                else:
                    gone.append(page)
        if gone:
            self.free = sorted(self.free + gone)

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
        """What pages hold; those in use stay with their users."""
        self.free = sorted([*self.free, *self.idle])
        self.known, self.names = {}, {}
        self.idle.clear()

    def attends(self, rows: Rows) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """A layer's attention, by layers."""
        return [partial(_attend, keys, values, rows) for keys, values in zip(self.k.unbind(), self.v.unbind())]

    def rows(self, tables: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]) -> Rows:
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
        return attention(q, k, v, rows.cu_seqlens, causal=True)
    return paged_attention(q, keys, values, rows.cu_seqlens, rows.tables, rows.lengths, rows=rows.most)


def names(tokens: np.ndarray, digests: Sequence[bytes], image_id: int, slots: int) -> list[bytes]:
    """Of a document's full pages, whose last token is not its own last: each says what it and all before it hold.

    digests: of its images.
    """
    found, name = [], b""
    images = np.cumsum(tokens == image_id)  # tokens of images up to each row
    for start in range(0, len(tokens) - PAGE, PAGE):
        rows = slice(start, start + PAGE)
        first, last = (int(images[start - 1]) if start else 0) // slots, -(-int(images[start + PAGE - 1]) // slots)
        seen = b"".join(digests[first:last]) if images[start + PAGE - 1] else b""
        name = hashlib.sha256(name + tokens[rows].tobytes() + seen).digest()
        found.append(name)
    return found
