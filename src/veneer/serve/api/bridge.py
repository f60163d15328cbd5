"""From the engine's streams, which its own thread fills, to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from veneer.serve.engine.request import Event, Finished
from veneer.serve.engine.stream import Stream


async def events_of(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield what several streams bring as it comes, each event with its stream's number.

    Whoever stops listening, because their reader has gone, gives the slots back.
    """
    loop, there = asyncio.get_running_loop(), asyncio.Event()

    def call() -> None:
        with suppress(RuntimeError):  # a loop that is closed has nobody left to tell
            loop.call_soon_threadsafe(there.set)

    try:
        for stream in streams:
            stream.listen(call)
        left = len(streams)
        while left:
            await there.wait()
            there.clear()
            for number, stream in enumerate(streams):
                for event in stream.waiting():
                    left -= isinstance(event, Finished)
                    yield number, event
    finally:
        cancel(streams)


def cancel(streams: Sequence[Stream]) -> None:
    """Give back the slots of answers that nobody reads any more."""
    for stream in streams:
        stream.cancel()
