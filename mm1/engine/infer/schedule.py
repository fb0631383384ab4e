"""Schedule requests: which run, on which pages of the cache, and how many rows of their prompts a step prefills.

Requests are admitted first-in, first-out with the pages of their prompts, and get one page at a time as they grow. At
most MAX_LONG long prompts are prefilled at once; short ones pass long ones that wait. When no page is free, the
youngest running request is preempted and waits again at its old place in the queue; its full pages stay in the prefix
cache until they are evicted. No request is preempted for a younger one, so the oldest always finishes. A beam search
gets all its pages at admission and is never preempted, because pages of beams are not in the prefix cache and all of
its work would be lost.
"""

from bisect import insort
from collections import deque
from operator import attrgetter

from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.request import Request
from mm1.kernels.dispatch import cdiv

MAX_OVERTAKEN = 64  # limit of requests that are admitted before an older one that lacks pages
MAX_BLOCKED = 8  # limit of requests lacking pages that one step skips to find one that does not
MAX_LONG = 4  # limit of long prompts in prefill; a prompt is long if it has more than 1 / MAX_LONG of a step's rows


class Schedule:
    """Hold the waiting and the running requests, both in the order of arrival.

    batch: limit of running texts, each beam counts as one; prefill: limit of rows of prompts in a step.
    """

    def __init__(self, cache: Cache, batch: int, prefill: int):
        self.cache, self.batch, self.prefill = cache, batch, prefill
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.arrived = 0

    def add(self, request: Request) -> None:
        """Add a request to the end of the queue."""
        self.arrived += 1
        request.number = self.arrived
        self.waiting.append(request)

    def admit(self) -> None:
        """Admit waiting requests while the batch has places and the cache has pages for their prompts.

        A request is skipped while another one prefills a prefix of its prompt, which it then reuses; while MAX_LONG
        long prompts are in prefill and its own is long; or, up to MAX_OVERTAKEN times, while the cache lacks pages for
        it.
        """
        texts = sum(request.sampling.num_beams for request in self.running)
        if not self.waiting or texts >= self.batch:
            return
        growing = sum(len(request.pages) < request.max_pages for request in self.running)
        prompts = [request for request in self.running if request.prefilling]
        computing = {name for request in prompts for name in request.page_names[request.computed // PAGE :]}
        long_rows = cdiv(self.prefill, MAX_LONG)
        long_prefills = sum(request.pending > long_rows for request in prompts)
        blocked: list[Request] = []  # requests that lack pages
        for request in list(self.waiting):
            beams = request.sampling.num_beams
            if texts + beams > self.batch:
                return
            if len(blocked) > MAX_BLOCKED:
                return
            if blocked and (blocked[0].preempted or blocked[0].overtaken >= MAX_OVERTAKEN):
                return
            names = request.sharable
            registered = request.registered = self.cache.count_registered(names, request.registered)
            if registered < len(names) and names[registered] in computing:
                continue
            is_long = request.pending - registered * PAGE > long_rows
            if is_long and long_prefills >= MAX_LONG and not request.preempted:  # a preempted one resumes early
                continue
            state = (self.cache.released, registered)
            if request.blocked_at and request.blocked_at[:2] == state and growing >= request.blocked_at[2]:
                blocked.append(request)  # no page has become free since it last lacked pages
                continue
            shared = self.cache.find(names[:registered])
            count = request.max_pages if beams > 1 else cdiv(request.pending, PAGE)
            ahead = min(request.max_pages, self.cache.pages // self.batch)
            pages = self.cache.allocate(count, shared, leave=growing, ahead=ahead)
            if pages is None:
                request.blocked_at = (*state, growing)
                blocked.append(request)
                continue
            for older in blocked:
                older.overtaken += 1
            self.waiting.remove(request)
            request.admit(pages, len(shared))
            insort(self.running, request, key=attrgetter("number"))
            computing.update(request.page_names[len(shared) :])
            texts += beams
            growing += len(request.pages) < request.max_pages
            long_prefills += is_long

    def plan_prefill(self) -> list[Request]:
        """Divide a step's rows among the prompts in prefill: set `request.due`, and return those that get any.

        The shortest prompts go first; the oldest gets at least half of the rows, so that none waits forever.
        """
        prompts = [request for request in self.running if request.prefilling]
        free = self.prefill
        reserved = min(prompts[0].pending, cdiv(self.prefill, 2)) if prompts else 0
        for request in sorted(prompts, key=attrgetter("pending")):
            reserved = 0 if request is prompts[0] else reserved
            request.due = min(request.pending, free - reserved)
            free -= request.due
        return [request for request in prompts if request.due]

    def plan_decode(self) -> list[Request]:
        """Return the requests whose next token a step decodes, after allocating a page for each that needs one."""
        return [r for r in list(self.running) if not r.prefilling and self._allocate(r)]  # the oldest first

    def _allocate(self, request: Request) -> bool:
        """Allocate a page if a request's next row needs one; preempt the youngest request if none is free.

        Return False if the request itself was preempted.
        """
        if request.beams or request.computed < len(request.pages) * PAGE:
            return True
        while request.pages:
            page = self.cache.extend(request.pages[-1])
            if page is not None:
                request.add_page(page)
                return True
            self.preempt(next(r for r in reversed(self.running) if r.sampling.num_beams == 1))
        return False

    def preempt(self, request: Request) -> None:
        """Release a running request's pages, and put it back to its place in the queue."""
        self.running.remove(request)
        self.cache.release(request.pages)
        request.preempt()
        self.waiting.insert(sum(other.number < request.number for other in self.waiting), request)

    def advance(self, request: Request, rows: int) -> None:
        """Count rows of a request as computed, and add pages that are now full to the prefix cache."""
        full = request.advance(rows)
        if full:
            numbers = slice(full.start, full.stop)
            self.cache.register(request.pages[numbers], request.page_names[numbers])

    def end(self, request: Request, why: str) -> None:
        """Remove a request from the queue or from the running requests, and end it for the reason `why`."""
        if request in self.running:
            self.running.remove(request)
            self.cache.release(request.pages)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.end(why)
