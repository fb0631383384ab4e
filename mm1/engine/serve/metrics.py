"""What Prometheus reads of a server."""

from collections.abc import Callable

from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.request import Request

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters, and the engine's gauges as they are when somebody looks."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "mm1_requests", "HTTP requests to /v1 by status; 499: the client left", ["status"], registry=r
        )
        self.images = Counter("mm1_images", "Images by what became of them", ["result"], registry=r)
        self.prompt = Counter("mm1_prompt_tokens", "Tokens of prompts, computed or shared", ["source"], registry=r)
        self.made = Counter("mm1_tokens", "Tokens made", registry=r)
        self.first = Histogram(
            "mm1_first_token_seconds", "From the request to its first text", buckets=FIRST, registry=r
        )
        self.next = Histogram(
            "mm1_token_seconds", "A token behind the first, mean of a request", buckets=NEXT, registry=r
        )
        gauges = {
            "mm1_running": ("Documents in the batch", lambda: len(engine.running)),
            "mm1_waiting": ("Documents that wait for room", lambda: len(engine.waiting)),
            "mm1_pages": ("Pages of the cache", lambda: engine.cache.pages),
            "mm1_pages_used": ("Pages of running documents", lambda: engine.cache.pages - engine.cache.room),
        }
        for name, (what, read) in gauges.items():
            self.gauge(name, what, read)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add what is looked at whenever somebody asks."""
        from prometheus_client import Gauge

        Gauge(name, what, registry=self.registry).set_function(read)

    def text(self) -> tuple[bytes, str]:
        """And its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def count(self, request: Request) -> None:
        """One that has ended or was left."""
        shared = request.shared * PAGE
        if request.pages:
            self.prompt.labels("shared").inc(shared)
            self.prompt.labels("computed").inc(len(request.document.tokens) - shared)
        self.made.inc(len(request.tokens))
