"""A server from start to end: load, listen, answer, drain."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import cast, get_args

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from veneer.errors import AdapterError, ConfigError, VeneerError, listed
from veneer.formats.locate import locate as find_adapter
from veneer.formats.training import ComputedIn, computed_in, other_base
from veneer.models.load import Base, bits_of_blocks, load_config
from veneer.models.locate import locate
from veneer.quant.settings import Bits, LoadBits, quantization_of
from veneer.quant.stack import quantized_weights
from veneer.serve.api.audit import AuditLog
from veneer.serve.api.http import AT_A_TIME, BACKLOG, PatientProtocol, PatientServer
from veneer.serve.app import create_app
from veneer.serve.config import ADAPTER_NAME, Keys, Limits, ServeConfig
from veneer.serve.engine.adapter_cache import opening
from veneer.serve.engine.base_weights import BaseWeights
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig
from veneer.serve.engine.served import EngineLike, Served
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.settings import TrainingBase
from veneer.serve.jobs.watching import Bounds
from veneer.training.recipe import DType

# uvicorn's own, which goes to stderr, for our messages too.
LOGGING = {
    **LOGGING_CONFIG,
    "loggers": LOGGING_CONFIG["loggers"] | {"veneer": {"handlers": ["default"], "level": "INFO"}},
}
LAST_SECONDS = 5.0  # for clients to read what is left, once answers have been cut
NAMED_SO = "its name must be at most 64 letters, digits, dots, dashes and underscores"


@dataclass(frozen=True)
class Listening:
    """The address of a server, what it serves, and notices for a person."""

    url: str
    base: str
    adapters: tuple[str, ...]
    notices: tuple[str, ...]


def serve(
    base: Base,
    adapters: Sequence[str],
    config: ServeConfig,
    *,
    keys: Keys | Callable[[], Keys],
    listener: socket.socket,
) -> Iterator[Listening]:
    """Serve a base with adapters (each "name=directory") until SIGTERM or Ctrl-C.

    Yields once, just before it listens. On the signal it takes no more requests; running answers
    may go on for `drain_seconds`, and are then cut; what of them is not read soon is dropped.
    Raises AdapterError for adapters that cannot be served.
    """
    served, notices = prepare(base, adapters, config)
    engine, jobs = served.engine, None
    with listener:
        try:
            jobs = jobs_of(base, served, config)
            ending = Ending(config.drain_seconds, engine, jobs)
            app = create_app(
                served,
                keys=keys,
                # Requests that the queue would refuse are refused before their bodies are read.
                limits=Limits(
                    in_flight=config.slots + config.queue,
                    upload_bytes=jobs.bounds.upload_bytes if jobs is not None else 0,
                    per_minute=config.rate_limit,
                ),
                runs=config.runs,
                loading_root=config.adapters_dir if config.enable_lora_loading else None,
                jobs=jobs,
                is_draining=lambda: ending.begun,
                audit=AuditLog(config.audit_log) if config.audit_log is not None else None,
            )
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            listener.listen(BACKLOG)  # clients may connect as soon as they know the address
            url = f"http://{shown}:{port}"
            yield Listening(url, served.name, served.library.names(), notices)
            listening = uvicorn.Config(
                app,
                log_config=LOGGING,
                http=PatientProtocol,
                ws="none",
                log_level="warning",
                server_header=False,
                backlog=AT_A_TIME,
            )
            if jobs is not None:
                jobs.start()
            with ending.on_signal():
                end_seconds = config.drain_seconds + LAST_SECONDS
                _Server(listening, ending, end_seconds).run(sockets=[listener])
        finally:
            if jobs is not None:
                jobs.close()
            engine.close(drain=False)


def jobs_of(base: Base, served: Served, config: ServeConfig) -> Jobs | None:
    """Return the trainings beside serving, over the base as it is loaded, where they are enabled.

    Raises VeneerError where another server has those below the directory of runs.
    """
    if not config.enable_training or config.runs is None:
        return None
    here, bits = served.computed_in, bits_of_jobs(base)
    dtype: DType = "float32" if here.dtype == "float32" else "bf16"
    # A later server may be started elsewhere.
    name = str(Path(base.name).resolve()) if Path(base.name).exists() else base.name
    training = TrainingBase(
        name,
        dtype,
        bits,
        here.head and bits in get_args(Bits),
        str(base.model.device),
    )
    bounds = Bounds(
        share=config.training_share,
        hours=config.training_hours,
        disk_bytes=int(config.training_disk * 1e9),
        upload_bytes=int(config.upload_size * 1e6),
        together=config.training_together,
    )
    return Jobs(config.runs, served, training, bounds)


def bits_of_jobs(base: Base) -> LoadBits | None:
    """Return the bits with which a job loads the weights that are served here."""
    stored = quantization_of(load_config(base.name).to_dict())
    weights = list(quantized_weights(base.model).values())
    if rounded := [weight for weight in weights if not weight.published]:
        # `veneer quantize` has written them so, or they were rounded as they were read.
        is_written = stored is not None and not stored.is_published
        return None if is_written else cast(LoadBits, rounded[0].bits)
    if weights:
        return None  # as they are in the files
    in_fewer_bits = stored is not None or bits_of_blocks(base.name) is not None
    return 16 if in_fewer_bits else None


def prepare(
    base: Base, named: Sequence[str], config: ServeConfig
) -> tuple[Served, tuple[str, ...]]:
    """Return what is served, its engine running, and notices for a person.

    The adapters named as "name=directory" are loaded. Those below `config.adapters_dir` are listed
    if their settings and shapes can be served, and otherwise named in a notice.
    Raises AdapterError for adapters that are named and cannot be served.
    """
    name, root = served_name(base), config.adapters_dir
    library = Library(find_adapters(named, root, name))
    for entry in library.entries():
        if not ADAPTER_NAME.fullmatch(entry.name):
            library.refuse(entry, f"{opening(entry)}: {NAMED_SO}.")
    settings = EngineConfig(
        slots=config.slots,
        queue=config.queue,
        speculate=config.speculate,
        context=config.context,
        cache_bytes=int(config.prefix_cache_memory * 1e9),
        cache_directory=config.prefix_cache,
        cache_file_bytes=int(config.prefix_cache_size * 1e9),
    )
    engine = Engine(base, library, settings)
    try:
        refusals, problems = engine.refuse_unservable(), []
        for adapter, _ in _parsed(named):
            try:
                engine.load(adapter)
            except AdapterError as error:
                problems.append(str(error))
        if problems:
            raise AdapterError(" ".join(problems))
    except BaseException:
        engine.close(drain=False)
        raise
    here = computed_in(base.model)
    notices = [*engine.notices, *refusals.values(), *_about_bases(library, here)]
    directories = {d.name for d in (root.iterdir() if root else ()) if d.is_dir()}
    if others := sorted(directories - {entry.name for entry in library.entries()}):
        notices.append(f"Below {root} there is no adapter in {listed(others)}.")
    served = Served(
        engine=engine,
        library=library,
        tokenizer=base.tokenizer,
        name=name,
        root=base.name,
        context=engine.context,
        computed_in=here,
        weights=BaseWeights(base.model),
    )
    return served, tuple(notices)


def _about_bases(library: Library, here: ComputedIn) -> Iterator[str]:
    """Yield a sentence for each adapter that was trained over the base in other bits."""
    for entry in library.entries():
        with suppress(AdapterError):  # why one cannot be read is said when it is asked for
            training = {} if entry.refusal else find_adapter(entry.directory).training
            if text := other_base(f"The adapter {entry.name!r}", training, here):
                yield text


def served_name(base: Base) -> str:
    """Return what requests call the base: its name, or its directory's where it is a path."""
    if isinstance(locate(base.name), str) or not Path(base.name).exists():
        return base.name
    return Path(base.name).resolve().name


def find_adapters(named: Sequence[str], root: Path | None, base: str) -> dict[str, Path]:
    """Return adapters by name: those named as "name=directory", and those below `root`.

    There each subdirectory is one, or the directory of a run, and each .gguf file may be one.
    Raises AdapterError, which lists everything that is wrong.
    """
    adapters: dict[str, Path] = {}
    problems = []
    for path in sorted(root.iterdir()) if root is not None else ():
        name = path.stem if path.suffix == ".gguf" and path.stem not in adapters else path.name
        if path.is_dir() or path.suffix == ".gguf":
            with suppress(AdapterError):  # other things may lie there
                adapters[name] = find_adapter(path).path
    for name, path in _parsed(named):
        if not ADAPTER_NAME.fullmatch(name):
            problems.append(f"{name!r}: {NAMED_SO}")
        try:
            adapters[name] = find_adapter(path).path
        except AdapterError as error:
            problems.append(str(error).rstrip("."))
    if base in adapters:
        problems.append(f"{base!r} is what the base is called")
    if problems:
        raise AdapterError(f"These adapters cannot be served: {'; '.join(problems)}.")
    return adapters


def _parsed(named: Sequence[str]) -> list[tuple[str, Path]]:
    pairs = []
    for text in named:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--adapter is {text!r}, but must be NAME=DIRECTORY.")
        pairs.append((name, Path(directory)))
    return pairs


def listen(config: ServeConfig) -> socket.socket:
    """Return a bound socket, so that an address in use is an error before anything loads.

    Raises VeneerError for an address that cannot be used.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        # asyncio turns Nagle's algorithm off only where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        return listener
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        way = " Another program has that port; name a free one by --port." if taken else ""
        why = error.strerror or error
        raise VeneerError(f"Cannot listen on {config.host}:{config.port}: {why}.{way}") from error


class Ending:
    """Whether the server is ending. From the first signal on, running answers have some seconds,
    and a training stops."""

    def __init__(self, seconds: float, engine: EngineLike, jobs: Jobs | None = None) -> None:
        self.begun = False
        self._jobs = jobs
        self._cut = Timer(seconds, lambda: engine.close(drain=False))
        self._cut.daemon = True

    def begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._cut.start()
            if self._jobs is not None:
                self._jobs.end()

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """Within, no signal ends the process: uvicorn raises again the one that stopped it."""
        ending = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, lambda *_: None) for number in ending}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._cut.cancel()


class _Server(PatientServer):
    """A server whose first signal begins the ending."""

    def __init__(self, config: uvicorn.Config, ending: Ending, end_seconds: float) -> None:
        super().__init__(config, end_seconds)
        self.ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ending.begin()
        super().handle_exit(sig, frame)
