"""From the engine's streams, which block, to the event loop, which must not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from threading import Thread
from typing import Protocol

from veneer.serve.request import Finished, Piece

Event = Piece | Finished


class Stream(Protocol):
    """An answer as it is made."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None:
        """Give the slot back; what iterates gets a Finished."""


async def events_of(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Event]]:
    """Yield what several streams bring as it comes, each event with its stream's number.

    Whoever stops listening, because their reader has gone, gives the slots back.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

    def pump(number: int, stream: Stream) -> None:
        # The loop is closed where a server ended without waiting for its answers.
        with suppress(RuntimeError):
            for event in stream:
                loop.call_soon_threadsafe(queue.put_nowait, (number, event))

    for number, stream in enumerate(streams):
        Thread(target=pump, args=(number, stream), name=f"answer-{number}", daemon=True).start()
    try:
        left = len(streams)
        while left:
            number, event = await queue.get()
            left -= isinstance(event, Finished)
            yield number, event
    finally:
        for stream in streams:
            stream.cancel()
