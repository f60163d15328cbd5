"""How a server is started: frozen, validated values that import no torch."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from veneer.checks import ABOVE_0, Rule, at_least, check_config, whole_number
from veneer.errors import ConfigError

log = logging.getLogger("veneer.serve")

# Names of adapters: nothing that a path, a header or a page could misread.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHARE = Rule(lambda value: at_least(0).holds(value) and value <= 1, "from 0 to 1")
KEY = re.compile(r"[!-~]{16,512}")  # visible ASCII, as a header carries it


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens and what it shows. Raises ConfigError for what cannot be."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own (loopback) needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    adapters_dir: Path | None = None
    """Directory whose subdirectories are adapters, each called as its directory is."""
    runs: Path | None = None
    """Directory of training runs (each a result of veneer tune), shown as they go; with
    --enable-training, those of jobs go there too."""
    api_key_file: Path | None = None
    """File with the key that requests must carry, or several, one a line; it is read again when it
    changes. Or set VENEER_API_KEY."""
    admin_key_file: Path | None = None
    """File with the key for loading adapters and for training, or several, as above; or set
    VENEER_ADMIN_KEY."""
    audit_log: Path | None = None
    """File that gets a JSON line for each request that needs the admin key, with its status."""
    enable_lora_loading: bool = False
    """Let holders of the admin key load and unload adapters below --adapters-dir."""
    enable_training: bool = False
    """Let holders of the admin key send files and train adapters, below --runs."""
    training_share: float = 0.1
    """Share of the processors' time that training has while answers are computed; without any, it
    has all."""
    training_together: int = 4
    """Jobs that may train at the same time, in passes that they share; 1 for one after another."""
    training_hours: float = 24.0
    """Hours that one training job may take."""
    training_disk: float = 50.0
    """Gigabytes that all files and runs below --runs may take together."""
    upload_size: float = 512.0
    """Megabytes that one file of rows may have."""
    slots: int = 16
    """Requests that are answered at the same time, in one batch."""
    queue: int = 64
    """Requests that may wait for a slot; further ones are refused (429)."""
    rate_limit: int | None = None
    """Requests with a body that one key may make in a minute, or, without an API key, one address;
    further ones are refused (429). No limit unless given."""
    context: int | None = None
    """Tokens of a prompt with its answer; the model's own context, at most 4096, unless given."""
    prefix_cache_memory: float = 1.0
    """Gigabytes of memory for keys and values of prompts' first tokens; 0 keeps none."""
    prefix_cache: Path | None = None
    """Directory that keeps keys and values of prompts' first tokens from one start to the next."""
    prefix_cache_size: float = 10.0
    """Gigabytes that all files below --prefix-cache may take."""
    speculate: int | None = None
    """Tokens of an answer that are guessed and computed at once, at most, where its prompt or the
    answer itself had the same before; 16 unless given, on CPUs. Answers stay the same."""
    drain_seconds: float = 30.0
    """How long running answers may go on after SIGTERM, in seconds, before they are cut."""

    def __post_init__(self) -> None:
        directory = Rule(lambda value: value.is_dir(), "a directory")
        growing = Rule(_can_be_written, "a file that can be written to, in a directory that exists")
        check_config(
            self,
            opening="Nothing can be served so",
            rules={
                "port": whole_number(0, most=65535),
                "slots": at_least(1),
                "queue": at_least(1),
                "rate_limit": at_least(1),
                "speculate": at_least(0),
                "drain_seconds": at_least(0),
                "prefix_cache_memory": at_least(0),
                "prefix_cache_size": ABOVE_0,
                "adapters_dir": directory,
                "runs": directory,
                "audit_log": growing,
                "training_share": SHARE,
                "training_together": at_least(1),
                "training_hours": ABOVE_0,
                "training_disk": ABOVE_0,
                "upload_size": ABOVE_0,
            },
            contradictions={
                "enable_lora_loading needs adapters_dir, below which adapters lie": (
                    self.enable_lora_loading and self.adapters_dir is None
                ),
                "enable_training needs runs, below which files and results go": (
                    self.enable_training and self.runs is None
                ),
                "admin_key_file would do nothing without enable_lora_loading or enable_training": (
                    self.admin_key_file is not None and not self.needs_admin_key
                ),
            },
        )

    @property
    def needs_admin_key(self) -> bool:
        """Whether something is enabled that not everybody may do."""
        return self.enable_lora_loading or self.enable_training

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine itself can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _can_be_written(file: Path) -> bool:
    return not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)


@dataclass(frozen=True)
class Keys:
    """The keys that requests must carry, of each kind one, or several, one a line. They show in no
    repr, error or log."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Limits:
    """What one request may take before it is refused."""

    body_bytes: int = 2_000_000
    """A prompt of 128,000 tokens is well below; a page or a book by mistake is not."""
    body_seconds: float = 30.0
    """From the end of the headers to the end of the body."""
    in_flight: int = 256
    """Requests with a body that are read or answered at the same time."""
    upload_bytes: int = 0
    """Of a form with a file; 0 where none is taken."""
    per_minute: int | None = None
    """Requests with a body that one key may make in a minute, or one address without a key."""


class KeyFiles:
    """The keys as their files are now: they can be exchanged while the server runs.

    A file with the new key below the old one takes both, until the old one is removed.
    """

    def __init__(self, config: ServeConfig, environment: Mapping[str, str]) -> None:
        self._config, self._environment = config, environment
        self._seen = self._stamps()
        self._keys = read_keys(config, environment)

    def __call__(self) -> Keys:
        """Return the keys. Those before stay where the files do not hold what they must."""
        stamps = self._stamps()
        if stamps != self._seen:
            self._seen = stamps
            try:
                self._keys = read_keys(self._config, self._environment)
                log.info("The keys have been read again.")
            except ConfigError as error:
                log.warning("The keys before stay in use: %s", error)
        return self._keys

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in (self._config.api_key_file, self._config.admin_key_file)]


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """Return what changes with a file's content."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None


def read_keys(config: ServeConfig, environment: Mapping[str, str]) -> Keys:
    """Return the keys from their files, or else from VENEER_API_KEY and VENEER_ADMIN_KEY.

    Raises ConfigError where one is missing that the settings need, or cannot be one.
    """
    api = _key(config.api_key_file, environment.get("VENEER_API_KEY"), "API")
    admin = None
    if config.needs_admin_key:
        admin = _key(config.admin_key_file, environment.get("VENEER_ADMIN_KEY"), "admin")
        if admin is None:
            what = "Loading adapters needs" if config.enable_lora_loading else "Training needs"
            raise ConfigError(
                f"{what} a key of its own: give --admin-key-file, or set VENEER_ADMIN_KEY."
            )
        if set(admin.split("\n")) & set((api or "").split("\n")):
            raise ConfigError("The admin key must be another than the API key.")
    if api is None and not config.is_loopback:
        raise ConfigError(
            f"{config.host} can be reached from other machines, which needs an API key: give "
            "--api-key-file, or set VENEER_API_KEY."
        )
    return Keys(api, admin)


def _key(file: Path | None, variable: str | None, what: str) -> str | None:
    key = variable
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            key = "\n".join(filter(None, map(str.strip, lines)))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The {what} key cannot be read from {file}: {error}.") from error
    elif not key:
        return None
    if key is None or not all(KEY.fullmatch(line) for line in key.split("\n")):
        raise ConfigError(
            f"The {what} key{f' in {file}' if file else ''} must be 16 to 512 visible ASCII "
            "characters without spaces."
        )
    return key
