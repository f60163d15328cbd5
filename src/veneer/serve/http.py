"""uvicorn's HTTP/1.1, with an end to its patience and errors in JSON."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.serve.faults import Fault

HEADER_SECONDS = 10.0


class PatientProtocol(H11Protocol):
    """A connection whose headers must come within `header_seconds`.

    uvicorn waits for ever for headers that come slowly, and each such connection takes a file and
    some memory. The time runs from the connection's opening, or from the first byte of a later
    request on it; once headers are complete, the guard looks after the body.
    """

    header_seconds = HEADER_SECONDS
    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()  # from here on uvicorn's own timer for idle connections runs

    def send_400_response(self, msg: str) -> None:
        self._end_with(Fault(400, msg))

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
            said = f"The headers took over {self.header_seconds:.0f} s to come."
            self._end_with(Fault(408, said))

    def _end_with(self, fault: Fault) -> None:
        """Answer what is no request, or none yet, and close."""
        body = json.dumps(fault.body()).encode()
        phrase = {400: "Bad Request", 408: "Request Timeout"}[fault.status]
        head = (
            f"HTTP/1.1 {fault.status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:
            # By hand, as h11 sends no response where it has seen no request.
            self.transport.write(head.encode() + body)
        self.transport.close()
