"""Count what a server does, for Prometheus."""

from collections.abc import Callable

from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.request import Request

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Count a server's requests, images and tokens; gauges read the engine's state at each scrape."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = r = CollectorRegistry()
        help_text = "HTTP requests to /v1 by status; 499: the client left"
        self.requests = Counter("mm1_requests", help_text, ["status"], registry=r)
        self.images = Counter("mm1_images", "Images by result, decoded or refused", ["result"], registry=r)
        help_text = "Tokens of prompts by source, computed or shared with an earlier prompt"
        self.prompt = Counter("mm1_prompt_tokens", help_text, ["source"], registry=r)
        self.generated = Counter("mm1_tokens", "Generated tokens", registry=r)
        help_text = "Seconds from a request to its first text"
        self.first = Histogram("mm1_first_token_seconds", help_text, buckets=FIRST, registry=r)
        help_text = "Seconds of a token after the first, mean of a request"
        self.next = Histogram("mm1_token_seconds", help_text, buckets=NEXT, registry=r)
        self.gauge("mm1_running", "Documents in the batch", lambda: len(engine.running))
        self.gauge("mm1_waiting", "Documents that wait to be admitted", lambda: len(engine.waiting))
        self.gauge("mm1_pages", "Pages of the cache", lambda: engine.pages)
        self.gauge("mm1_pages_used", "Pages that running documents use", lambda: engine.pages - engine.cache.available)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge that calls `read` at each scrape."""
        from prometheus_client import Gauge

        Gauge(name, help_text, registry=self.registry).set_function(read)

    def text(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def count(self, request: Request) -> None:
        """Count the tokens of a request that has ended or was cancelled."""
        shared = request.shared * PAGE
        if request.pages:
            self.prompt.labels("shared").inc(shared)
            self.prompt.labels("computed").inc(len(request.document.tokens) - shared)
        self.generated.inc(len(request.tokens))
