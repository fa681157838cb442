"""What is counted, for Prometheus: `GET /metrics`."""

import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import mlx.core as mx
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from mlx_drift.serve.request import Ended, Failed

if TYPE_CHECKING:
    from mlx_drift.serve.conversation import Conversation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for every counter, which nobody reads
        self.registry = CollectorRegistry()
        r = self.registry

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"mlx_drift_{name}", what, labels, registry=r)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"mlx_drift_{name}", what, registry=r)

        self._http = counter("http_requests", "Responses by path and status.", "path", "status")
        self._answers = counter("answers", "Answers by how they ended.", "model", "ended")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._cached = counter("cached_tokens", "Tokens of prompts found in caches.", "model")
        self._generated = counter("generated_tokens", "Tokens of answers.", "model")
        self._rounds = counter("rounds", "Rounds with drafts.", "model", "source")
        self._plain = counter("plain_tokens", "Tokens decoded without drafts.", "model")
        labels = ("model", "source", "position")
        self._tested = counter("drafted_tokens", "Drafts tested, by position in a round.", *labels)
        self._accepted = counter("accepted_tokens", "Drafts accepted, by position.", *labels)
        self._device = counter("device_seconds", "Seconds of turns, by what was done.", "kind")
        self._seconds = Histogram(
            "mlx_drift_answer_seconds",
            "Seconds from a request to the end of its answer.",
            registry=r,
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self._running = gauge("running", "Conversations that take turns.")
        self._waiting = gauge("waiting", "Requests in the queue.")
        self._bytes = gauge("cache_bytes", "Bytes of caches, in use and idle.")
        self._most = gauge("cache_bytes_most", "The most they ever were.")
        self._bound = gauge("cache_bytes_bound", "What they may be.")
        self._memory = gauge("device_memory_bytes", "Bytes that MLX has in use.")
        self._idle = gauge("idle_caches", "Caches in no use.")
        self._evicted = gauge("evicted_caches", "Caches that had to leave memory.")
        self._highest = 0

    def bound(self, bytes: int) -> None:
        """Notes the bound of the caches."""
        self._bound.set(bytes)

    def response(self, path: str, status: int) -> None:
        """Counts a response; `path` is one of the server's own."""
        self._http.labels(path, str(status)).inc()

    def turn(self, conversation: "Conversation", was_reading: bool, seconds: float) -> None:
        """Counts a turn."""
        self._device.labels("prompt" if was_reading else "answer").inc(seconds)

    def answer(self, conversation: "Conversation", event: Ended | Failed) -> None:
        """Counts an answer, and what its rounds came to."""
        usage, model = conversation.usage, conversation.model.name
        source = conversation.model.drafter_kind
        ended = event.reason if isinstance(event, Ended) else event.kind
        self._answers.labels(model, ended).inc()
        self._seconds.observe(time.monotonic() - conversation.ticket.asked_at)
        if isinstance(event, Ended):
            self._prompt.labels(model).inc(usage.prompt_tokens)
        self._cached.labels(model).inc(usage.cached_tokens)
        self._generated.labels(model).inc(usage.completion_tokens)
        self._plain.labels(model).inc(usage.plain_tokens)
        drafted: tuple[int, Sequence[int], Sequence[int]] = (
            usage.rounds,
            usage.tested,
            usage.accepted,
        )
        for rounds, tested, accepted in usage.free.values():
            drafted = drafted[0] - rounds, _less(drafted[1], tested), _less(drafted[2], accepted)
        for name, (rounds, tested, accepted) in {**usage.free, source: drafted}.items():
            if rounds:
                self._rounds.labels(model, name).inc(rounds)
            for by_position, counts in ((self._tested, tested), (self._accepted, accepted)):
                for position, count in enumerate(counts, 1):
                    by_position.labels(model, name, str(position)).inc(count)

    def sizes(
        self, *, running: int, waiting: int, caches: int, idle_caches: int, evicted: int
    ) -> None:
        """Notes how much there is."""
        self._highest = max(self._highest, caches)
        gauges: Mapping[Gauge, int] = {
            self._memory: mx.get_active_memory(),
            self._running: running,
            self._waiting: waiting,
            self._bytes: caches,
            self._most: self._highest,
            self._idle: idle_caches,
            self._evicted: evicted,
        }
        for gauge, value in gauges.items():
            gauge.set(value)

    def text(self) -> bytes:
        """Returns all of it in Prometheus' text format."""
        return generate_latest(self.registry)


def _less(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Takes the counts of some rounds off those of all."""
    return [x - y for x, y in zip_longest(a, b, fillvalue=0)]
