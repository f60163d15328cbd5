"""A server's life: load, listen, answer, drain, end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import FrameType

import uvicorn

from veneer.errors import AdapterError, ConfigError, VeneerError
from veneer.formats import native
from veneer.formats.peft import directory as peft
from veneer.models.load import Base
from veneer.models.locate import locate
from veneer.serve.api.http import AT_A_TIME, BACKLOG, PatientProtocol, PatientServer
from veneer.serve.app import create_app
from veneer.serve.config import ADAPTER_NAME, Keys, Limits, ServeConfig
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig
from veneer.serve.engine.served import Served


@dataclass(frozen=True)
class Listening:
    """Where a server can be reached, which adapters it knows, and what a person should know."""

    url: str
    base: str
    adapters: tuple[str, ...]
    notices: tuple[str, ...]


def serve(
    base: Base,
    adapters: Sequence[str],
    config: ServeConfig,
    *,
    keys: Keys,
    listener: socket.socket,
) -> Iterator[Listening]:
    """Serve a base with adapters (each "name=directory") until SIGTERM or Ctrl-C.

    Yields once, when it is about to listen. On the signal no more work is taken; what runs may go
    on for `drain_seconds`, and is then cut.
    Raises AdapterError for adapters that cannot be.
    """
    name = served_name(base)
    places = find_adapters(adapters, config.adapters_dir, name)
    settings = EngineConfig(slots=config.slots, queue=config.queue, context=config.context)
    engine = Engine(base, Library(places), settings)
    with listener:
        try:
            for each, _ in _parsed(adapters):
                engine.load(each)  # what was named on the command line is proved at the start
            served = Served(
                engine=engine,
                library=engine.library,
                tokenizer=base.tokenizer,
                name=name,
                root=base.name,
                context=engine.context,
                vocabulary=base.model.config.get_text_config().vocab_size,
            )
            ending = Ending(config.drain_seconds, engine)
            app = create_app(
                served,
                keys=keys,
                # What finds no place is told so before its body is looked at, which costs least.
                limits=Limits(in_flight=config.slots + config.queue),
                runs=config.runs,
                loading_root=config.adapters_dir if config.enable_lora_loading else None,
                is_draining=lambda: ending.begun,
            )
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            listener.listen(BACKLOG)  # who comes as soon as the address is told waits a moment
            url = f"http://{shown}:{port}"
            yield Listening(url, name, engine.library.names(), engine.notices)
            listening = uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                log_level="warning",
                server_header=False,
                backlog=AT_A_TIME,
            )
            with ending.on_signal():
                _Server(listening, ending).run(sockets=[listener])
        finally:
            engine.close(drain=False)


def served_name(base: Base) -> str:
    """Return what requests call the base: its name, or its directory's where it is a path."""
    if isinstance(locate(base.name), str) or not Path(base.name).exists():
        return base.name
    return Path(base.name).resolve().name


def find_adapters(given: Sequence[str], directory: Path | None, base: str) -> dict[str, Path]:
    """Return the adapters given as "name=directory", and those that lie in a directory, by name.

    There each subdirectory is one, or holds one as lora_adapter, as veneer tune leaves it.
    Raises AdapterError, which lists everything that is wrong.
    """
    found: dict[str, Path] = {}
    problems = []
    for place in sorted(directory.iterdir()) if directory is not None else ():
        for candidate in (place, place / "lora_adapter"):
            if is_adapter(candidate) and ADAPTER_NAME.fullmatch(place.name):
                found[place.name] = candidate
                break
    for name, place in _parsed(given):
        if not ADAPTER_NAME.fullmatch(name):
            problems.append(f"{name!r} is no name (letters, digits, dots, dashes, underscores)")
        elif not is_adapter(place):
            problems.append(f"{place} holds no adapter")
        found[name] = place
    if base in found:
        problems.append(f"{base!r} is what the base is called")
    if problems:
        raise AdapterError(f"These adapters cannot be served: {'; '.join(problems)}.")
    return found


def is_adapter(place: Path) -> bool:
    """Say whether a directory holds an adapter of a format that we read."""
    return native.found_method(place) is not None or (place / peft.CONFIG).is_file()


def _parsed(given: Sequence[str]) -> list[tuple[str, Path]]:
    pairs = []
    for each in given:
        name, equals, place = each.partition("=")
        if not (name and equals and place):
            raise ConfigError(f"--adapter is {each!r}, but must be NAME=DIRECTORY.")
        pairs.append((name, Path(place)))
    return pairs


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that is bound, so that an address in use is told before anything loads.

    Raises VeneerError for an address that cannot be had.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        # With its protocol named, or asyncio would leave small packets waiting for each other.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        return listener
    except OSError as error:
        raise VeneerError(f"Cannot listen on {config.host}:{config.port}: {error}.") from error


class Ending:
    """Whether the server is to end. From the first signal on, running answers have some time."""

    def __init__(self, seconds: float, engine: Engine) -> None:
        self.begun = False
        self._cut = Timer(seconds, lambda: engine.close(drain=False))
        self._cut.daemon = True

    def begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._cut.start()

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """Within, SIGTERM is the proper way to end: uvicorn sends itself once more what it got."""
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self._cut.cancel()


class _Server(PatientServer):
    """A server that tells when it is asked to end."""

    def __init__(self, config: uvicorn.Config, ending: Ending) -> None:
        super().__init__(config)
        self.ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ending.begin()
        super().handle_exit(sig, frame)
