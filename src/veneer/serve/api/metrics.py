"""The server's metrics for Prometheus: responses, tokens, times, and the engine's numbers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.engine.request import Answer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The metrics of one server, in a registry of its own.

    engine_numbers: returns the engine's own numbers, by name; called whenever they are read.
    """

    def __init__(self, engine_numbers: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        counter, timer = self._counter, self._timer
        self.responses = counter("http_responses", "Responses, by status.", "status")
        self.running = Gauge(
            "veneer_answers_running", "Answers that are being made.", registry=self.registry
        )
        self.ended = counter("answers", "Answers that ended, by why.", "reason")
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.cached = counter("prompt_tokens_cached", "Those of them that the cache had.")
        self.new = counter("new_tokens", "Tokens of answers.")
        self.first = timer("first_piece_seconds", "Time to a first piece.")
        self.whole = timer("answer_seconds", "Time to the end of an answer.")
        self.registry.register(_Numbers(engine_numbers))

    async def watch(
        self, pieces: AsyncGenerator[tuple[int, Answer], None]
    ) -> AsyncGenerator[tuple[int, Answer], None]:
        """Pass the pieces of answers on, and count them."""
        began, started = time.monotonic(), set[int]()
        with self.running.track_inprogress():
            try:
                async for number, piece in pieces:
                    passed = time.monotonic() - began
                    if number not in started:
                        started.add(number)
                        self.first.observe(passed)
                    if piece.reason is not None:
                        self._count(piece, passed)
                    yield number, piece
            finally:
                await pieces.aclose()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"veneer_{name}", what, labels, registry=self.registry)

    def _timer(self, name: str, what: str) -> Histogram:
        return Histogram(f"veneer_{name}", what, buckets=SECONDS, registry=self.registry)

    def _count(self, end: Answer, seconds: float) -> None:
        self.ended.labels(end.reason).inc()
        self.prompt.inc(end.prompt_tokens)
        self.cached.inc(end.cached_tokens)
        self.new.inc(end.new_tokens)
        self.whole.observe(seconds)


class CountResponses:
    """Counts the responses of `app` by their status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


class _Numbers(Collector):
    """The engine's numbers, taken whenever the metrics are read."""

    def __init__(self, numbers: Callable[[], Mapping[str, float]]) -> None:
        self.numbers = numbers

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self.numbers().items():
            yield GaugeMetricFamily(f"veneer_engine_{name}", name.replace("_", " "), value=value)
