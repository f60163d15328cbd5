"""Prefix blocks in files, which outlive the server: a file a block, called by the block's hash.

Beside a server's blocks lie those of other bases, each in a directory of its own: equal hashes mean
equal keys and values only where base, numbers and kernels are the same. A file is the SHA-256 of
what follows, and a safetensors file, whose metadata say again what it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread

import torch
from safetensors.torch import load, save
from torch import Tensor

from veneer.errors import VeneerError
from veneer.files import new_file, write_json
from veneer.generate.runners.compiled import KVBlock
from veneer.generate.runners.runner import PrefixBlock
from veneer.kernels.transfer import OnTheWay, sent

log = logging.getLogger("veneer.serve")

ENDING = ".kvblock"
IDENTITY = "base.json"  # marks a directory of blocks, and says of which base
DIGEST = hashlib.sha256().digest_size
IS_HASH = re.compile(f"[0-9a-f]{{{2 * DIGEST}}}")
MOST_WAITING = 2**28  # bytes of blocks that wait to be written; more are not written
CLOSE_SECONDS = 30.0  # for writing what waits at the end; a slow disk may need minutes
MOST_NOTED = 4096  # blocks whose use is noted in memory alone
LEFT_OVER = 3600.0  # seconds after which a file that was never finished is nobody's any more
SHRINK_TO = 0.9  # of the limit, so that not every block has to look for an older one
ORDER = 1e-3  # seconds by which a block counts as older than the one before it in its prompt


@dataclass(frozen=True, eq=False)
class _Write:
    """A block that waits to be written: its tensors by their names, on their way to the host."""

    key: bytes
    nbytes: int
    names: tuple[str, ...]
    coming: OnTheWay


class PrefixFiles:
    """Blocks of one base below `directory`, all of whose blocks take `limit` bytes at most.

    For one thread, the engine's, which never waits for the disk: a thread of this class reads and
    writes. What cannot be read is as if it were not there, and the log says why.
    """

    def __init__(
        self, directory: Path, limit: int, identity: Mapping[str, str], device: torch.device
    ) -> None:
        """Raises VeneerError for a directory that cannot be written."""
        self.directory, self.limit, self.device = directory, limit, device
        self._identity = json.dumps(dict(sorted(identity.items())))
        self.home = directory / hashlib.sha256(self._identity.encode()).hexdigest()[:32]
        try:
            # For its owner alone, as blocks tell what prompts said.
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.home.chmod(0o700)  # or an error: a directory of another user
            write_json(self.home / IDENTITY, identity)
            _remove_left_over(self.home)
            stats = _stats(_all_blocks(directory))
            self.nbytes = sum(about.st_size for about in stats.values())
            ours = [path for path in stats if path.parent == self.home]
            self._sizes = {_hash_in(path): stats[path].st_size for path in ours}
        except OSError as error:
            raise VeneerError(f"Prefix blocks cannot be kept in {directory}: {error}.") from error
        self._changed = Condition()  # guards what follows
        self._used: dict[bytes, float] = {}  # when blocks were used last, where no file says it yet
        self._to_read: deque[bytes] = deque()
        self._reading: set[bytes] = set()  # asked for, and not taken yet
        self._arrived: list[tuple[bytes, PrefixBlock | None]] = []
        self._to_write: deque[_Write] = deque()
        self._waiting = 0  # bytes of them
        self._closing = False
        self._until = 0.0  # when nothing more is written, once it is closing
        self._failed = ""  # the last error of the disk
        self._thread = Thread(target=self._work, name="veneer-prefix-files", daemon=True)
        self._thread.start()

    # ---- for the engine's thread ----

    def fetch(self, hashes: Sequence[bytes], most: int) -> None:
        """Begin to read a prompt's blocks, from the first of these hashes up to one that is not
        here, or to `most` bytes."""
        with self._changed:
            for key in hashes:
                most -= self._sizes.get(key, most + 1)
                if most < 0:
                    break
                if key not in self._reading:
                    self._reading.add(key)
                    self._to_read.append(key)
            self._changed.notify_all()

    def take(self) -> list[tuple[bytes, PrefixBlock]]:
        """Return the blocks that have come, by their hashes."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            self._reading.difference_update(key for key, _ in arrived)
        return [(key, self._on_device(block)) for key, block in arrived if block is not None]

    def is_reading(self, hashes: Sequence[bytes]) -> bool:
        """Say whether some of these blocks have been asked for and not been taken."""
        return not self._reading.isdisjoint(hashes)

    def wait(self, seconds: float) -> None:
        """Wait until a block has come, but no longer than this."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived, seconds)

    def use(self, hashes: Sequence[bytes]) -> None:
        """Note that a prompt's first blocks were used: those behind them are removed first."""
        now = time.time()
        with self._changed:
            self._used.update((key, now - ORDER * number) for number, key in enumerate(hashes))
            if len(self._used) > MOST_NOTED:
                self._changed.notify_all()

    def keep(self, key: bytes, block: PrefixBlock) -> None:
        """Have a block written, unless it is here already or too much waits to be written."""
        with self._changed:
            if key in self._sizes or self._waiting + block.nbytes > MOST_WAITING or self._closing:
                return
            tensors = _tensors_of(block)
            self._waiting += block.nbytes
            coming = OnTheWay(*tensors.values())
            self._to_write.append(_Write(key, block.nbytes, tuple(tensors), coming))
            self._changed.notify_all()

    def close(self) -> None:
        """Write what waits, for CLOSE_SECONDS at most, and end."""
        with self._changed:
            if not self._closing:
                self._closing, self._until = True, time.monotonic() + CLOSE_SECONDS
            self._changed.notify_all()
        self._thread.join()

    def _on_device(self, block: PrefixBlock) -> PrefixBlock:
        tensors = _tensors_of(block)
        return _block_of({name: sent(x, self.device) for name, x in tensors.items()})

    # ---- on the thread of this class ----

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._closing and self._to_write and time.monotonic() >= self._until:
                    log.warning("%d prefix blocks were not kept at the end.", len(self._to_write))
                    self._to_write.clear()
                reads = self._to_read and not self._closing  # nobody takes what comes then
                key = self._to_read.popleft() if reads else None
                write = self._to_write.popleft() if key is None and self._to_write else None
            if key is not None:
                block = self._read(key)
                with self._changed:
                    self._arrived.append((key, block))
                    self._changed.notify_all()
            elif write is not None:
                self._write(write)
                with self._changed:
                    self._waiting -= write.nbytes
            elif not self._closing:
                self._note_use()
            else:
                break
        self._note_use()

    def _has_work(self) -> bool:
        too_many = len(self._used) > MOST_NOTED
        return bool(self._to_read or self._to_write or self._closing or too_many)

    def _read(self, key: bytes) -> PrefixBlock | None:
        """Return a block, or None where its file is gone or is not what it should be."""
        path = self._path(key)
        try:
            return _block_of(self._checked(key, path.read_bytes()))
        except FileNotFoundError:  # another server has removed it
            pass
        except OSError as error:
            self._say(f"The prefix block {path} cannot be read: {error}.")
        except Exception as error:  # readers of damaged files have errors of many kinds
            log.warning("The prefix block %s is damaged (%s), and was removed.", path, error)
            with suppress(OSError):
                path.unlink()
        with self._changed:
            self._sizes.pop(key, None)
        return None

    def _checked(self, key: bytes, data: bytes) -> dict[str, Tensor]:
        """Return the tensors of a file. Raises ValueError where it is not what was written."""
        rest = data[DIGEST:]
        if hashlib.sha256(rest).digest() != data[:DIGEST]:
            raise ValueError("its bytes are others than were written")
        header = json.loads(rest[8 : 8 + int.from_bytes(rest[:8], "little")])
        if header["__metadata__"] != self._metadata(key):
            raise ValueError("it is another block, or of another base")
        return load(rest)

    def _write(self, write: _Write) -> None:
        key = write.key
        try:
            tensors = [tensor.contiguous() for tensor in write.coming.arrived()]
            data = save(dict(zip(write.names, tensors, strict=True)), self._metadata(key))
            size = len(data) + DIGEST
            if self.nbytes + size > self.limit:
                self._shrink(size)
            if self.nbytes + size > self.limit:
                return
            with new_file(self._path(key)) as temporary, temporary.open("wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            self.nbytes += size
        except Exception as error:  # of a disk that is full, or a device that failed
            self._say(f"A prefix block cannot be written below {self.home}: {error}.")
            return
        with self._changed:
            self._sizes[key] = size

    def _shrink(self, more: int) -> None:
        """Remove the blocks that were used longest ago, of whatever base, until there is space for
        `more` bytes. Other servers may write here too, so all is counted anew."""
        self._note_use()
        stats = _stats(_all_blocks(self.directory))
        files = [(about.st_mtime, about.st_size, path) for path, about in stats.items()]
        self.nbytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self.nbytes + more <= SHRINK_TO * self.limit:
                break
            path.unlink(missing_ok=True)
            self.nbytes -= size
            if path.parent == self.home:
                with self._changed:
                    self._sizes.pop(_hash_in(path), None)

    def _note_use(self) -> None:
        """Let files say when their blocks were used."""
        with self._changed:
            used, self._used = self._used, {}
        for key, moment in used.items():
            with suppress(OSError):
                os.utime(self._path(key), (moment, moment))

    def _path(self, key: bytes) -> Path:
        return self.home / f"{key.hex()}{ENDING}"

    def _metadata(self, key: bytes) -> dict[str, str]:
        return {"format": "pt", "base": self._identity, "block": key.hex()}

    def _say(self, text: str) -> None:
        """Write an error of the disk into the log, unless the last one was the same."""
        if text != self._failed:
            self._failed = text
            log.warning("%s", text)


def _tensors_of(block: PrefixBlock) -> dict[str, Tensor]:
    if isinstance(block, KVBlock):
        return {"keys": block.keys, "values": block.values}
    assert isinstance(block, Tensor)
    return {"block": block}


def _block_of(tensors: Mapping[str, Tensor]) -> PrefixBlock:
    return tensors["block"] if len(tensors) == 1 else KVBlock(**tensors)


def _all_blocks(directory: Path) -> list[Path]:
    """Return the files of all bases' blocks. Nothing else below the directory is ours."""
    return [path for mark in directory.glob(f"*/{IDENTITY}") for path in _blocks_in(mark.parent)]


def _blocks_in(home: Path) -> list[Path]:
    files = home.glob(f"*{ENDING}")
    return [path for path in files if IS_HASH.fullmatch(path.stem) and path.is_file()]


def _stats(paths: Sequence[Path]) -> dict[Path, os.stat_result]:
    """Return sizes and times of files, without those that another server has just removed."""
    stats = {}
    for path in paths:
        with suppress(FileNotFoundError):
            stats[path] = path.stat()
    return stats


def _hash_in(path: Path) -> bytes:
    return bytes.fromhex(path.stem)


def _remove_left_over(home: Path) -> None:
    """Remove what a server that was killed had not finished to write."""
    for path in home.glob(f".*{ENDING}.*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                path.unlink()
