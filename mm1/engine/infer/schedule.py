"""Which requests run, on which pages of the cache, and how many rows of their prompts a step computes.

Requests are admitted first-in, first-out, each with pages for its prompt, and take pages one by one as they grow. Of
long prompts only PARTS are computed at once; short ones pass those that wait for their turn. When
none is left the youngest running request is preempted: its full pages stay known, so that they are found again unless
others needed them, and it waits at its old place in the queue. Nobody is preempted for a younger one, so the oldest
comes to its end. A search with beams has all its pages from the beginning and is not preempted: its beams have pages
of their own, which are not found by their names, and nothing of it could be kept.
"""

from bisect import insort
from collections import deque
from operator import attrgetter

from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.request import Request
from mm1.kernels.dispatch import cdiv

OVERTAKEN = 64  # requests that may begin before an older one for which there are too few pages
SHORT = 8  # requests, each short of pages, behind which a step looks for one that is not
PARTS = 4  # long prompts that are computed at once; a prompt is long if it has more rows than such a part of a step


class Schedule:
    """Holds the requests that wait and those that run, both in the order of their arrival.

    batch: documents that run at once, each beam counts as one; prefill: rows of prompts that a step computes.
    """

    def __init__(self, cache: Cache, batch: int, prefill: int):
        self.cache, self.batch, self.prefill = cache, batch, prefill
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.arrived = 0

    def add(self, request: Request) -> None:
        self.arrived += 1
        request.number = self.arrived
        self.waiting.append(request)

    def admit(self) -> None:
        """Admit waiting requests while the batch has places and the cache has pages for their prompts.

        A request waits, and those behind it go first, while another computes a prefix of its prompt, while PARTS long
        prompts are computed and its own is long, or while the cache lacks pages for it; OVERTAKEN bounds the last.
        """
        if not self.waiting:
            return
        width = sum(request.sampling.num_beams for request in self.running)
        if width >= self.batch:
            return
        growing = sum(len(request.pages) < request.room for request in self.running)
        prompts = [request for request in self.running if request.prefilling]
        computing = {name for request in prompts for name in request.cached[request.computed // PAGE :]}
        part = cdiv(self.prefill, PARTS)
        long = sum(request.pending > part for request in prompts)
        short: list[Request] = []  # of pages
        for request in list(self.waiting):
            if width + request.sampling.num_beams > self.batch:
                return
            if short and (short[0].preempted or short[0].overtaken >= OVERTAKEN or len(short) > SHORT):
                return
            names = request.sharable
            known = request.known = self.cache.known_of(names, request.known)
            if known < len(names) and names[known] in computing:
                continue
            is_long = request.pending - known * PAGE > part
            if is_long and long >= PARTS and not request.preempted:  # who was put back goes on as soon as it can
                continue
            state = (self.cache.dropped, known)
            if request.short and request.short[:2] == state and growing >= request.short[2]:
                short.append(request)  # as when this was last found: no page has become free since
                continue
            shared = self.cache.shared(names[:known])
            whole = request.sampling.num_beams > 1
            count = request.room if whole else cdiv(request.pending, PAGE)
            ahead = min(request.room, self.cache.pages // self.batch)
            pages = self.cache.take(count, shared, leave=growing, ahead=ahead)
            if pages is None:
                request.short = (*state, growing)
                short.append(request)
                continue
            for older in short:
                older.overtaken += 1
            self.waiting.remove(request)
            request.admit(pages, len(shared))
            insort(self.running, request, key=attrgetter("number"))
            computing.update(request.cached[len(shared) :])
            width += request.sampling.num_beams
            growing += len(request.pages) < request.room
            long += is_long

    def share(self) -> list[Request]:
        """Return the prompts that this step computes rows of, and note how many: `prefill` in all.

        The shortest go first; the oldest has at least half the rows, so that nobody is put off for ever.
        """
        prompts = [request for request in self.running if request.prefilling]
        if not prompts:
            return []
        oldest, left = prompts[0], self.prefill
        kept = min(oldest.pending, cdiv(self.prefill, 2))
        for request in sorted(prompts, key=attrgetter("pending")):
            kept = 0 if request is oldest else kept
            request.due = min(request.pending, left - kept)
            left -= request.due
        return [request for request in prompts if request.due]

    def going(self) -> list[Request]:
        """Return the requests that a step decodes, each with a page for its next row."""
        return [r for r in list(self.running) if not r.prefilling and self._fits(r)]  # the oldest first

    def _fits(self, request: Request) -> bool:
        """Give a request a page if its next row needs one; preempt the youngest for it, be it itself."""
        if request.beams or request.computed < len(request.pages) * PAGE:
            return True
        while request.pages:
            page = self.cache.grow(request.pages[-1])
            if page is not None:
                request.grow(page)
                return True
            self._preempt(next(r for r in reversed(self.running) if r.sampling.num_beams == 1))
        return False

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.drop(request.pages)
        request.preempt()
        at = next((i for i, other in enumerate(self.waiting) if other.number > request.number), len(self.waiting))
        self.waiting.insert(at, request)

    def advance(self, request: Request, rows: int) -> None:
        """Take note that the cache holds so many rows more of it; pages that are full by now become known."""
        full = request.advance(rows)
        if full:
            places = slice(full.start, full.stop)
            self.cache.remember(request.pages[places], request.cached[places])

    def end(self, request: Request, why: str) -> None:
        """Take it out, wherever it is."""
        if request in self.running:
            self.running.remove(request)
            self.cache.drop(request.pages)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.end(why)
