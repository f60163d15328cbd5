"""uvicorn's HTTP/1.1 with time limits, turns for crowds, and errors in JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.serve.api.errors import ApiError

log = logging.getLogger("veneer.serve")

HEADER_SECONDS = 10.0
BACKLOG = 2048  # connections that the system keeps until they are accepted
AT_A_TIME = 16  # connections that are accepted, or read, in one turn of the event loop
QUICK = b"GET "  # requests that begin so cost little, and do not wait for their turn


class PatientServer(uvicorn.Server):
    """uvicorn's server, for a `config` whose backlog is AT_A_TIME.

    That is how many connections asyncio accepts in one turn; the system may keep more waiting.
    end_seconds: how long connections may last once it ends. uvicorn would wait for ever for a
    client that reads no more, or that brings its request piece by piece.
    """

    def __init__(self, config: uvicorn.Config, end_seconds: float) -> None:
        super().__init__(config)
        self.end_seconds = end_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                socket.socket(fileno=socket.dup(listener.fileno())).listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(self.end_seconds, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        connections = list(self.server_state.connections)
        log.warning("%d connections did not end in time, and were cut.", len(connections))
        for connection in connections:
            connection.transport.abort()


class Turns:
    """A queue of calls, of which AT_A_TIME are made in one turn of the event loop.

    Where hundreds of requests come at once, everything else would otherwise wait for all of them.
    """

    def __init__(self) -> None:
        self._calls = deque[Callable[[], None]]()

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if len(self._calls) == 1:
            asyncio.get_running_loop().call_soon(self._some)

    def _some(self) -> None:
        for _ in range(min(AT_A_TIME, len(self._calls))):
            self._calls.popleft()()
        if self._calls:
            asyncio.get_running_loop().call_soon(self._some)


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


class PatientProtocol(H11Protocol):
    """A connection whose headers must come within `header_seconds`.

    uvicorn would wait for ever for headers that come slowly, and each such connection takes a file
    and some memory. The time runs from the opening of the connection, or from the first byte of a
    later request on it. Once the headers are complete, the guard limits the body.
    """

    header_seconds = HEADER_SECONDS
    _end: asyncio.TimerHandle | None = None
    _unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        if not self._unread and data.startswith(QUICK):
            super().data_received(data)
            self._watch()
            return
        if not self._unread:
            _turns.setdefault(self.loop, Turns()).add(self._read)
        self._unread += data

    def _read(self) -> None:
        data, self._unread = self._unread, b""
        if data and not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread = b""
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()  # from here on uvicorn's own timer for idle connections runs

    def send_400_response(self, msg: str) -> None:
        self._end_with(ApiError(400, msg))

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._end is None:
            self._end = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _too_slow(self) -> None:
        self._end = None
        if not self.transport.is_closing():
            message = f"The headers took over {self.header_seconds:.0f} s to come."
            self._end_with(ApiError(408, message))

    def _end_with(self, error: ApiError) -> None:
        """Answer what is not a request, or not a whole one, and close the connection."""
        body = json.dumps(error.body()).encode()
        phrase = {400: "Bad Request", 408: "Request Timeout"}[error.status]
        head = (
            f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:
            # Written by hand: h11 sends no response where it has seen no request.
            self.transport.write(head.encode() + body)
        self.transport.close()
