"""Writing that cannot leave half a file: to a temporary name, to the disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError, VeneerError, listed

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty temporary directory; it takes the place of `path` as a whole at the end.

    An existing directory is replaced only if it holds the file `marker`, or nothing, so that nobody
    else's files are deleted. Raises VeneerError otherwise.
    """
    check_replaceable(path, marker=marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():
                _settle(inside)
            elif inside.is_dir():
                _sync(inside)  # a file is lost without the entry that names it
        temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)  # the new one could not take its place
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
