"""An answer as it is made: pieces, and at last how it ended. For any thread, and for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from threading import Condition

from veneer.serve.engine.request import Event, Finished, Piece, Request, Token


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    finished: Finished


class Stream:
    """The events of one request. Iterating, with `for` or `async for`, ends after Finished.

    One reader takes each event once. `cancel` ends the answer from any thread.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._events: deque[Event] = deque()
        self._changed = Condition()
        self._listener: Callable[[], None] | None = None
        self._cancelled = False
        self._over = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Ask for the answer to end now; Finished("cancelled") follows, unless it has ended."""
        self._cancelled = True

    def next(self, timeout: float | None = None) -> Event:
        """Return the next event. Raises TimeoutError where none comes for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, timeout):
                raise TimeoutError(f"no event came within {timeout} seconds")
            return self._events.popleft()

    def waiting(self) -> list[Event]:
        """Take the events that are there, without waiting for more."""
        with self._changed:
            found = list(self._events)
            self._events.clear()
        return found

    def listen(self, call: Callable[[], None]) -> None:
        """Have `call` called, on the engine's thread, whenever there are new events; it is called
        at once where there are some already. It must be quick, and never wait."""
        with self._changed:
            self._listener = call
            there = bool(self._events)
        if there:
            call()

    def result(self) -> Answer:
        """Wait for the whole answer."""
        pieces: list[Piece] = []
        for event in self:
            if isinstance(event, Finished):
                tokens = tuple(token for piece in pieces for token in piece.tokens)
                return Answer("".join(piece.text for piece in pieces), tokens, event)
            pieces.append(event)
        raise AssertionError("a stream ends with Finished")

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.next()
            yield event
            if isinstance(event, Finished):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, there = asyncio.get_running_loop(), asyncio.Event()

        def call() -> None:
            # A loop that has been closed has nobody left to tell.
            if not loop.is_closed():
                loop.call_soon_threadsafe(there.set)

        self.listen(call)
        while True:
            await there.wait()
            there.clear()
            for event in self.waiting():
                yield event
                if isinstance(event, Finished):
                    return

    def put(self, event: Event) -> None:
        """Add an event; for the engine. Nothing comes after Finished."""
        with self._changed:
            if self._over:
                return
            self._over = isinstance(event, Finished)
            self._events.append(event)
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            listener()
