"""Writing that cannot leave half a file: to a temporary name, to the disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.checksums import SUMS, sums_of
from veneer.errors import AdapterError, ConfigError, StorageError, VeneerError, listed

if TYPE_CHECKING:
    from torch import Tensor

# In the names of what is being written, and of a directory that is being replaced. Their random end
# comes after the last dot, for torch writes what is before that into the file.
PARTIAL, OLD = ".partial-", ".old-"
RANDOM = 8  # characters that tempfile adds
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h
# By which errors of torch, safetensors and numpy say what the system's error was.
SIGNS_OF_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|os error (28|122)\b|database or disk is full"
)
SIGNS_OF_FAILURE = re.compile(
    r"Input/output error|os error 5\)|PytorchStreamWriter failed|unexpected pos|iostream error"
    r"|\d requested and \d+ written|disk I/O error"
)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end.

    Raises StorageError where the disk is full or fails.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    temporary = Path(name)
    try:
        with disk_errors(path):
            _claim(handle)
            yield temporary
            _settle(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty temporary directory; it takes the place of `path` as a whole at the end, with
    the checksums of its files.

    An existing directory is replaced only if it holds the file `marker`, or nothing, so that nobody
    else's files are deleted. Raises VeneerError otherwise, StorageError where the disk is full or
    fails.
    """
    remove_leftovers(path.parent, path.name)
    check_replaceable(path, marker=marker)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        handle = os.open(temporary, os.O_RDONLY)
    try:
        with disk_errors(path):
            _claim(handle)
            yield temporary
            (temporary / SUMS).write_text(sums_of(temporary), encoding="utf-8")
            temporary.chmod(0o777 & ~_umask())
            sync_directory(temporary)
            _take_place(temporary, path)
            _sync(path.parent)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Give a directory the name `path`. What has that name goes to the temporary name, or away."""
    if not path.exists():
        temporary.rename(path)
        return
    if _exchange(temporary, path):
        return
    old = temporary.with_name(temporary.name.replace(PARTIAL, OLD))
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at one moment, and return whether that was done: only Linux can, and not
    with every file system."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def rename(path: Path, name: Path) -> None:
    """Give a file or directory another name, which is on the disk when this returns.

    Raises StorageError where the disk fails.
    """
    with disk_errors(name):
        path.rename(name)
        _sync(name.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory of ours so that at no moment half of it has its name."""
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        path.replace(temporary)  # an empty directory may be replaced
    except OSError:
        temporary.rmdir()
        raise
    with disk_errors(path):  # rmtree's own name files without their directories
        shutil.rmtree(temporary)


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Remove what processes that were killed left of writing `name` in a directory, `*` for any,
    and give a directory its name back that was about to be replaced.

    What another process is writing has a lock, and stays.
    """
    try:
        import fcntl
    except ImportError:
        return
    for old in directory.glob(f".{_literal(name)}{OLD}{'?' * RANDOM}"):
        original = old.with_name(old.name[1:].rpartition(OLD)[0])
        with suppress(OSError):
            shutil.rmtree(old) if original.exists() else old.rename(original)
    for leftover in directory.glob(f".{_literal(name)}{PARTIAL}{'?' * RANDOM}"):
        with suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


def is_leftover(name: str) -> bool:
    """Return whether a name is one that `remove_leftovers` looks for."""
    return bool(re.fullmatch(rf"\..+({re.escape(PARTIAL)}|{re.escape(OLD)}).{{{RANDOM}}}", name))


def _claim(handle: int) -> None:
    """Lock a temporary file or directory, for `remove_leftovers`, until it is closed."""
    with suppress(ImportError, OSError):  # not all systems have locks, nor all file systems
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _prefix(path: Path) -> str:
    return f".{path.name}{PARTIAL}"


def _literal(name: str) -> str:
    return name if name == "*" else glob.escape(name)


def check_writable(directory: Path) -> None:
    """Raise ConfigError where a directory cannot be made or written into, StorageError where the
    disk is full."""
    above = nearest_existing(directory)
    try:
        with tempfile.TemporaryFile(dir=above) as probe:
            probe.write(b"0")
    except OSError as error:
        if explained := storage_error(error, directory):
            raise explained from error
        raise ConfigError(
            f"{above} cannot be written to ({error.strerror or error}); name another place than "
            f"{directory}."
        ) from error


def check_free(path: Path, size: int) -> None:
    """Raise StorageError where the disk has fewer free bytes than what is to be written there."""
    usage = shutil.disk_usage(nearest_existing(path))
    if usage.total and usage.free < size:  # some network file systems say nothing
        raise StorageError(
            f"{path} takes {size / 1e6:,.0f} MB, but the disk has {usage.free / 1e6:,.0f} MB. "
            "Nothing was written. Make room or name another place, and run the command again."
        )


def nearest_existing(path: Path) -> Path:
    """Return the nearest of a path and those above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def storage_error(error: BaseException, path: Path | None = None) -> StorageError | None:
    """Return what an error of a full or failing disk means to a person; None for other errors.

    path: what was being written
    """
    if isinstance(error, VeneerError):
        return error if isinstance(error, StorageError) else None
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or SIGNS_OF_FULL.search(text):
        why = "the disk is full" if number != errno.EDQUOT else "the disk quota is used up"
    elif number == errno.ENOMEM or "Cannot allocate memory" in text:
        why = "there is no memory for it"
    elif number == errno.EIO or SIGNS_OF_FAILURE.search(text):
        why = "the disk is full, or fails"
    else:
        return None
    named = error.filename if path is None and isinstance(error, OSError) else path
    place = "A file" if named is None else str(named)
    return StorageError(
        f"{place} cannot be written: {why}. What was whole is still whole. Make room or name "
        "another place, and run the command again; a training run goes on with --resume."
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """In this context errors of the disk at writing `path` are StorageErrors, whatever library
    raises them."""
    try:
        yield
    except Exception as error:
        inner = error.__cause__ if isinstance(error, StorageError) else error
        if inner is not None and (explained := storage_error(inner, path)):
            raise explained from inner
        raise


def check_replaceable(path: Path, *, marker: str) -> None:
    """Raise VeneerError if `path` holds something, but not the file that marks it as ours."""
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise VeneerError(f"{path} holds other things (no {marker}); name another place.")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory. What goes meanwhile, as a
    run's old checkpoints do, counts nothing."""
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else 0
    size = 0
    for place, _, names in os.walk(path):  # which passes over directories that are gone
        for name in names:
            with suppress(FileNotFoundError):
                size += (Path(place) / name).stat().st_size
    return size


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, in one piece."""
    write_text(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """Return JSON as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises AdapterError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .pt or a .safetensors file, by the suffix, in one piece.

    `metadata` goes into the header of a .safetensors file.
    """
    import torch  # here, because writing text needs no torch
    from safetensors.torch import save_file

    plain = {name: _by_itself(t.detach().cpu().contiguous()) for name, t in tensors.items()}
    with new_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
        else:
            torch.save(plain, temporary)


def _by_itself(tensor: Tensor) -> Tensor:
    """Return a tensor that is all of its memory: with a view torch.save would write all that it is
    a view of, such as a mapped file, of which torch 2.15 reads no odd number of bytes back."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def read_tensors(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Read a .pt (tensors only, nothing is executed) or a .safetensors file.

    With `shapes_only` no value is read: the tensors are on torch's meta device. Raises AdapterError
    for a file that is damaged or holds anything but named tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            # Copied out of the mapped file, which may be replaced, and where tensors are not
            # aligned: products of such tensors take other kernels, which round differently.
            tensors = {
                name: tensor.to("meta") if shapes_only else tensor.clone()
                for name, tensor in load_file(path).items()
            }
        else:
            _check_stored(path)
            tensors = torch.load(
                path, weights_only=True, map_location="meta" if shapes_only else "cpu"
            )
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, KeyError) as error:
        raise AdapterError(f"{path} cannot be read as tensors ({error}).") from error
    except Exception as error:  # torch's unpickler has errors of many kinds for damaged files
        raise AdapterError(f"{path} is damaged or holds more than tensors ({error}).") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise AdapterError(f"{path} must hold named tensors and nothing else.")
    without_values = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without_values and not shapes_only:
        raise AdapterError(f"{path} holds tensors without values: {listed(without_values)}.")
    return tensors


def _check_stored(path: Path) -> None:
    """Raise ValueError for a compressed archive, which may unpack to more than memory holds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        # torch writes without compression, but would read a compressed file.
        if any(member.file_size != member.compress_size for member in members):
            raise ValueError("it is compressed")


def sync_directory(directory: Path) -> None:
    """Bring a directory and all that is below it to the disk, files with the mode of new ones."""
    for place in directory.rglob("*"):
        if place.is_file():
            _settle(place)
        elif place.is_dir():
            _sync(place)
    _sync(directory)


def _settle(path: Path) -> None:
    # Neither torch nor safetensors syncs, and safetensors writes with mode 0600.
    path.chmod(0o666 & ~_umask())
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting another
    os.umask(mask)
    return mask
