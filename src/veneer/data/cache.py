"""Where encoded rows are kept for later runs: a directory for each content, below one for all.

`$VENEER_CACHE`, else `$XDG_CACHE_HOME/veneer`, else `~/.cache/veneer`. A directory's name is a hash
of the data, the tokenizer with its template, and the settings. A file of up to `WHOLE_FILE` bytes
counts by its content; a larger one by its size, the time when it was last changed, and samples.
What nothing has used for `DAYS` days is removed when something new is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.hub import dataset_of, is_hub
from veneer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # of the chunks; another one is another content
WHOLE_FILE = 2**26
SAMPLES, SAMPLE = 64, 2**16  # of a larger file, evenly spread, its first and last bytes among them
DAYS = 30
USED, LOCK = "used", ".lock"


def home() -> Path:
    """Return the directory below which encoded rows are kept."""
    if place := os.environ.get("VENEER_CACHE"):
        return Path(place) / "data"
    place = os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / "veneer" / "data"


def key_of(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]
) -> str:
    """Return the name of what is made of these files with these settings."""
    known = {
        "format": FORMAT,
        "files": [identity_of(file) for file in files],
        "tokenizer": None if tokenizer is None else _tokenizer_hash(tokenizer),
        **settings,
    }
    return _hash(json.dumps(known, sort_keys=True).encode())[:32]


def identity_of(file: Path) -> list[Any]:
    """Return what tells a file from what it was, or others: what it is called last, and its content
    as far as that is read. A split of the hub is the files in which `datasets` keeps it."""
    if is_hub(file):
        dataset = dataset_of(file)
        caches = [identity_of(Path(cache["filename"])) for cache in dataset.cache_files]
        return [dataset.num_rows, dataset.column_names, caches]
    stat = file.stat()
    kind = "".join(file.suffixes[-2:])
    if stat.st_size <= WHOLE_FILE:
        with file.open("rb") as opened:
            return [kind, hashlib.file_digest(opened, "sha256").hexdigest()]
    samples = hashlib.sha256()
    with file.open("rb") as opened:
        for number in range(SAMPLES):
            opened.seek((stat.st_size - SAMPLE) * number // (SAMPLES - 1))
            samples.update(opened.read(SAMPLE))
    return [kind, stat.st_size, stat.st_mtime_ns, samples.hexdigest()]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    settings = [
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.backend_tokenizer.to_str(),
    ]
    return _hash(json.dumps(settings, default=str, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """In this context, raise DataError where a directory of the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Encoded rows cannot be kept in {directory}: {error.strerror or error}; mend that, or "
            "name another directory by the environment variable VENEER_CACHE"
        ) from error


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Yield whether this process alone works in a directory now, which is made for that; it does
    not wait for others. The lock goes with the process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        yield _locks(file.fileno())


def _locks(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once do the same work, and each writes it whole
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def note_use(directory: Path) -> None:
    """Note that a directory is in use now."""
    with suppress(OSError):  # a cache of others may be read-only
        (directory / USED).touch()


def prune(above: Path) -> None:
    """Remove what nothing has used for long, unless another process works there."""
    for directory in above.iterdir() if above.is_dir() else ():
        used = directory / USED
        if used.exists() and used.stat().st_mtime < time.time() - 86400 * DAYS:
            with locked(directory) as free:
                if free:
                    shutil.rmtree(directory, ignore_errors=True)
