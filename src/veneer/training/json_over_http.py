"""JSON asked of a server over HTTP, within limits of time and size. Nothing follows a redirection,
which might take the key to another host."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from email.utils import parsedate_to_datetime
from threading import Event, Timer
from typing import Any
from urllib.parse import urlsplit

from veneer.errors import ConfigError, TrainingError, VeneerWarning, shortened

KEY = "OPENAI_API_KEY"  # the environment variable, as OpenAI's own clients have it
CONNECT_SECONDS = 10
BUSY = (429, 503)
PATIENCE = 600  # seconds that a busy server is waited for, in all, before it has answered
LONGEST_PAUSE = 60  # seconds between two questions, unless the server says otherwise


class Refused(TrainingError):
    """A server answered with another status than 200. says: its own words, as far as it has any."""

    def __init__(self, message: str, *, status: int, says: str, pause: float | None) -> None:
        super().__init__(message)
        self.status, self.says, self.pause = status, says, pause


def ask(
    address: str,
    path: str,
    body: Any = None,
    *,
    seconds: float,
    most: int,
) -> Any:
    """Return the JSON that a server answers: to a GET, or to a POST of a body.

    A busy server is asked again, which is warned of (VeneerWarning). seconds: how long an answer
    may take. most: the bytes that it may have. Raises Refused for another status than 200,
    TrainingError where no answer comes, or none that can be read, and ConfigError for a key that
    cannot be sent.
    """
    waited = 0.0
    while True:
        try:
            return _exchange(address, path, body, seconds=seconds, most=most)
        except Refused as refused:
            if refused.status not in BUSY:
                raise
            pause = min(LONGEST_PAUSE, max(1.0, waited)) if refused.pause is None else refused.pause
            if waited + pause > PATIENCE:
                more = f"It was waited for {waited:,.0f} s, and asks for {pause:,.0f} s more."
                raise TrainingError(f"{refused} {more}") from refused
            waited += pause
            text = f"{refused} It is asked again in {pause:,.0f} s ({waited:,.0f} s so far)."
            warnings.warn(text, VeneerWarning, stacklevel=2)
            time.sleep(pause)


def _exchange(address: str, path: str, body: Any, *, seconds: float, most: int) -> Any:
    where = urlsplit(address)
    place = where.path.rstrip("/") + path
    url = f"{where.scheme}://{where.netloc}{place}"
    headers = {"accept": "application/json", "connection": "close"} | _authorization()
    data = None
    if body is not None:
        data, headers["content-type"] = json.dumps(body).encode(), "application/json"
    secure = where.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    assert where.hostname is not None
    connection = kind(where.hostname, where.port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
    except (OSError, UnicodeError) as error:
        why = "nothing answers there" if isinstance(error, TimeoutError) else str(error)
        raise TrainingError(f"{url} cannot be reached: {_shown(why)}.") from error
    late = Event()

    def end() -> None:
        # The socket's own limit is of each piece, and a server may send one after another for ever.
        late.set()
        with suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)

    own = connection.sock
    own.settimeout(seconds)
    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET" if data is None else "POST", place, data, headers)
        response = connection.getresponse()
        text = response.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise _is_late(url, seconds) from error
        why = _shown(str(error)) or type(error).__name__
        raise TrainingError(f"{url} broke off: {why}.") from error
    finally:
        timer.cancel()
        connection.close()
    if late.is_set():
        raise _is_late(url, seconds)
    if response.status != 200:
        raise _refused(url, response, text)
    if len(text) > most:
        raise TrainingError(f"{url} answers more than {most / 1e6:,.0f} MB, and was not read.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{url} answers what is no JSON, or only a part of it.") from error


def _is_late(url: str, seconds: float) -> TrainingError:
    return TrainingError(f"{url} gave no answer within {seconds:g} s.")


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The environment variable {KEY} has characters that no key has.")
    return {"authorization": f"Bearer {key}"} if key else {}


def _refused(url: str, response: http.client.HTTPResponse, text: bytes) -> Refused:
    status, says = response.status, _words_of(text)
    if 300 <= status < 400:
        to = _shown(response.getheader("location") or "another place")
        message = f"{url} leads to {to}, which is not followed; name the address that answers."
    else:
        message = f"{url} answers {status}{f': {says}' if says else ''}."
    return Refused(message, status=status, says=says, pause=_pause(response))


def _words_of(text: bytes) -> str:
    """Return a server's message, in OpenAI's form or another's."""
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return _shown(value).rstrip(".") if isinstance(value, str) else ""


def _shown(text: str) -> str:
    """Return what a server says for a person: one short line, without the key."""
    key = os.environ.get(KEY, "").strip()
    text = text.replace(key, "(the key)") if key else text
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
    return shortened(line, 300)


def _pause(response: http.client.HTTPResponse) -> float | None:
    """Return the seconds after which a server wants to be asked again, None where it names none."""
    after = response.getheader("retry-after") or ""
    with suppress(ValueError, OverflowError):
        return max(1.0, float(int(after)))
    with suppress(ValueError, OverflowError, TypeError):
        return max(1.0, parsedate_to_datetime(after).timestamp() - time.time())
    return None
