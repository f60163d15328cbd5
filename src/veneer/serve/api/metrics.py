"""What Prometheus is told: requests, tokens and times, and the engine's own numbers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.engine.request import Event, Finished

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Counts:
    """The numbers of one server, in a registry of its own.

    `engine_numbers` gives the engine's own, by name, when they are asked for.
    """

    def __init__(self, engine_numbers: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "veneer_http_responses", "Responses, by status.", ["status"], registry=self.registry
        )
        self.running = Gauge(
            "veneer_answers_running", "Answers that are being made.", registry=self.registry
        )
        self.ended = Counter(
            "veneer_answers", "Answers that ended, by why.", ["reason"], registry=self.registry
        )
        self.prompt = Counter("veneer_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached = Counter(
            "veneer_prompt_tokens_cached",
            "Those of them that the cache had.",
            registry=self.registry,
        )
        self.new = Counter("veneer_new_tokens", "Tokens of answers.", registry=self.registry)
        self.first = Histogram(
            "veneer_first_piece_seconds",
            "Time to a first piece.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "veneer_answer_seconds",
            "Time to the end of an answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Numbers(engine_numbers))

    async def watch(
        self, events: AsyncGenerator[tuple[int, Event], None]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Pass the events of answers on, counting them."""
        began, seen = time.monotonic(), set[int]()
        with self.running.track_inprogress():
            try:
                async for number, event in events:
                    passed = time.monotonic() - began
                    if number not in seen:
                        seen.add(number)
                        self.first.observe(passed)
                    if isinstance(event, Finished):
                        self._ended(event, passed)
                    yield number, event
            finally:
                await events.aclose()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _ended(self, end: Finished, seconds: float) -> None:
        self.ended.labels(end.reason).inc()
        self.prompt.inc(end.prompt_tokens)
        self.cached.inc(end.cached_tokens)
        self.new.inc(end.new_tokens)
        self.whole.observe(seconds)


class CountResponses:
    """Counts the responses of `app` by their status."""

    def __init__(self, app: ASGIApp, *, counts: Counts) -> None:
        self.app, self.counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counts.responses.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


class _Numbers(Collector):
    """The engine's numbers, asked for whenever somebody looks."""

    def __init__(self, numbers: Callable[[], Mapping[str, float]]) -> None:
        self.numbers = numbers

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self.numbers().items():
            yield GaugeMetricFamily(f"veneer_engine_{name}", name.replace("_", " "), value=value)
