"""An answer as it is made, from the engine's thread to any other thread or to an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from threading import Condition

from veneer.serve.engine.request import Answer, Request


class Stream:
    """The pieces of one answer. Iterating, with `for` or `async for`, ends after the last piece.

    One reader takes each piece once. `cancel` ends the answer from any thread.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        self._pieces: deque[Answer] = deque()
        self._changed = Condition()
        self._listener: Callable[[], None] | None = None
        self._ended = False

    def cancel(self) -> None:
        """Ask for the answer to end now; unless it has ended, its reason will be "cancelled"."""
        self.cancelled = True

    def next(self, timeout: float | None = None) -> Answer:
        """Return the next piece. Raises TimeoutError where none comes for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces, timeout):
                raise TimeoutError(f"no piece of the answer came within {timeout} seconds")
            return self._pieces.popleft()

    def take_all(self) -> list[Answer]:
        """Take the pieces that have come, without waiting for more."""
        with self._changed:
            pieces = list(self._pieces)
            self._pieces.clear()
        return pieces

    def listen(self, call: Callable[[], None]) -> None:
        """Have `call` called, on the engine's thread, whenever a piece comes; and now, if some
        have come already. It must return quickly and never wait."""
        with self._changed:
            self._listener = call
            has_pieces = bool(self._pieces)
        if has_pieces:
            call()

    def result(self) -> Answer:
        """Wait for the whole answer."""
        return Answer.joined(list(self))

    def __iter__(self) -> Iterator[Answer]:
        piece = None
        while piece is None or piece.reason is None:
            piece = self.next()
            yield piece

    async def __aiter__(self) -> AsyncIterator[Answer]:
        async for _, piece in pieces_of([self]):
            yield piece

    def add(self, piece: Answer) -> None:
        """Add a piece; for the engine. Pieces after the last one are dropped."""
        with self._changed:
            if self._ended:
                return
            self._ended = piece.reason is not None
            self._pieces.append(piece)
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            listener()


async def pieces_of(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Answer], None]:
    """Yield the pieces of several answers as they come, each with its stream's number.

    Where the caller stops reading before the end, the answers are cancelled.
    """
    loop, have_come = asyncio.get_running_loop(), asyncio.Event()

    def call() -> None:
        with suppress(RuntimeError):  # the loop may have been closed meanwhile
            loop.call_soon_threadsafe(have_come.set)

    try:
        for stream in streams:
            stream.listen(call)
        running = len(streams)
        while running:
            await have_come.wait()
            have_come.clear()
            for number, stream in enumerate(streams):
                for piece in stream.take_all():
                    running -= piece.reason is not None
                    yield number, piece
    finally:
        cancel(streams)


def cancel(streams: Sequence[Stream]) -> None:
    """Cancel answers that nobody reads any more, so that their slots become free."""
    for stream in streams:
        stream.cancel()
