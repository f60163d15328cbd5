"""A frozen base that stays in this machine's memory, or on its disk, and is copied to the device
block by block, each block while the one before it is computed.

In pinned memory a copy runs beside the device's computing, on a stream of its own. What is on the
disk is read by a thread into one of two pinned blocks, and copied from there.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.kernels.transfer import PINNED
from veneer.models.block_buffers import Buffer, BufferedBase, Filling, aligned, offsets_of
from veneer.quant.mapped import are_mapped, populate, release
from veneer.quant.settings import Offload

WHY_NOT_WHOLE = "its base is offloaded, so the device never has all of it"
# torch's allocator of pinned memory rounds up to powers of two: what is kept there is cut into such
# pieces, but for a rest of up to so many bytes.
SMALLEST_PIECE = 2**20


@dataclass(frozen=True)
class _Piece:
    """Bytes in host memory, and where they go in a buffer."""

    offset: int
    bytes: Tensor  # (bytes,) in uint8


class _Copies:
    """Copies to a device, in their order, beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_beside = device.type in PINNED
        self._stream = torch.Stream(device) if self.is_beside else None

    def ready(self) -> torch.Event | None:
        """Return the event after which memory that is taken now is free of earlier uses."""
        if not self.is_beside:
            return None
        return torch.accelerator.current_stream(self.device).record_event()

    def begin(self, whole: Tensor, pieces: Sequence[_Piece], ready: torch.Event | None) -> _Copied:
        """Begin to copy pieces into a buffer, (bytes,)."""
        if self._stream is None:
            _copy(whole, pieces)
            return _Copied(self.device, None)
        assert ready is not None
        self._stream.wait_event(ready)
        with self._stream:
            _copy(whole, pieces)
        return _Copied(self.device, self._stream.record_event())


def _copy(whole: Tensor, pieces: Sequence[_Piece]) -> None:
    for piece in pieces:
        target = whole[piece.offset : piece.offset + len(piece.bytes)]
        target.copy_(piece.bytes, non_blocking=True)


@dataclass(frozen=True)
class _Copied:
    """A copy that has begun."""

    device: torch.device
    done: torch.Event | None

    def wait(self) -> None:
        """Have the device's own stream go on behind the copy; the host goes on at once."""
        if self.done is not None:
            torch.accelerator.current_stream(self.device).wait_event(self.done)


class HostBuffer(Buffer):
    """A buffer whose bytes are in host memory, pinned where a device copies from there."""

    def __init__(self, tensors: Sequence[Tensor], copies: _Copies) -> None:
        self._copies = copies
        size = sum(aligned(tensor.nbytes) for tensor in tensors)
        self._pieces, offset = [], 0
        for length in _lengths(size) if copies.is_beside else [size]:
            block = torch.zeros(length, dtype=torch.uint8, pin_memory=copies.is_beside)
            self._pieces.append(_Piece(offset, block[: size - offset]))
            offset += length
        for tensor, offset in zip(tensors, offsets_of(tensors), strict=True):
            _write(_bytes_of(tensor), offset, self._pieces)
        super().__init__(tensors, size, copies.device)

    def _fill(self) -> Filling:
        return self._copies.begin(self._whole, self._pieces, self._copies.ready())


class _Reader:
    """Reads blocks from the disk in a thread, ahead of their use, and copies them to the device."""

    def __init__(self, copies: _Copies) -> None:
        self.copies = copies
        self._thread = ThreadPoolExecutor(1, "veneer-offload")
        self._blocks: list[Tensor] = []  # two in pinned memory, in turns
        self._copied: list[_Copied] = []  # the last copies from them

    def begin(self, whole: Tensor, pieces: Sequence[_Piece]) -> Filling:
        ready = self.copies.ready()
        return _Read(self._thread.submit(self._read, whole, pieces, ready))

    @torch.no_grad()
    def _read(self, whole: Tensor, pieces: Sequence[_Piece], ready: torch.Event | None) -> _Copied:
        sources = [piece.bytes for piece in pieces]
        populate(sources)
        if self.copies.is_beside:
            block = self._free_block(len(whole))
            _copy(block, pieces)
            pieces = [_Piece(0, block)]
        copied = self.copies.begin(whole, pieces, ready)
        if self.copies.is_beside:
            self._copied.append(copied)
        release(sources)
        return copied

    def _free_block(self, size: int) -> Tensor:
        """Return pinned memory from which nothing is still being copied."""
        if len(self._copied) < 2:
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        else:
            done = self._copied.pop(0).done
            assert done is not None
            done.synchronize()  # the thread waits, and nobody else
            self._blocks.append(self._blocks.pop(0))
        if len(self._blocks[-1]) < size:
            self._blocks[-1] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._blocks[-1][:size]


@dataclass(frozen=True)
class _Read:
    """A block that is being read."""

    copied: Future[_Copied]

    def wait(self) -> None:
        self.copied.result().wait()


class DiskBuffer(Buffer):
    """A buffer whose bytes are in files: those that its tensors are mapped from, or a new one
    without a name in `directory`, which goes with the process."""

    def __init__(self, tensors: Sequence[Tensor], reader: _Reader, directory: Path) -> None:
        self._reader = reader
        sources = [_bytes_of(tensor) for tensor in tensors]
        self._pieces = [
            _Piece(offset, source if is_mapped else _in_file(source, directory))
            for source, offset, is_mapped in zip(
                sources, offsets_of(tensors), are_mapped(sources), strict=True
            )
        ]
        size = sum(aligned(tensor.nbytes) for tensor in tensors)
        super().__init__(tensors, size, reader.copies.device)

    def _fill(self) -> Filling:
        return self._reader.begin(self._whole, self._pieces)


def offload_base(
    model: PreTrainedModel, place: Offload, device: torch.device, *, directory: Path | None = None
) -> PreTrainedModel:
    """Let a frozen model's blocks be on `device` only while they are used, in place, before
    adapters are attached; what is in no block is moved there.

    place: where they are else. directory: of the file for what is in none yet; the system's unless
    given. Raises ModelError for a model whose list of layers is not known, and where the disk has
    no room.
    """
    offloader(model, place, device, directory=directory).finish()
    return model.to(device)  # type: ignore[arg-type]


def offloader(
    model: PreTrainedModel, place: Offload, device: torch.device, *, directory: Path | None = None
) -> BufferedBase:
    """Return what offloads a model while its weights come in."""
    copies = _Copies(device)
    buffer_of: Callable[[Sequence[Tensor]], Buffer]
    if place == "cpu":
        buffer_of = partial(HostBuffer, copies=copies)
    else:
        at = Path(tempfile.gettempdir()) if directory is None else directory.absolute()
        at = next(place for place in (at, *at.parents) if place.exists())
        buffer_of = partial(DiskBuffer, reader=_Reader(copies), directory=at)
    return BufferedBase(model, buffer_of, device=device, why_not_whole=WHY_NOT_WHOLE)


def _lengths(size: int) -> list[int]:
    """Return the powers of two, falling, into which memory of a size is cut."""
    units = -(size // -SMALLEST_PIECE)
    bits = reversed(range(units.bit_length()))
    return [SMALLEST_PIECE << bit for bit in bits if units >> bit & 1]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _write(source: Tensor, offset: int, pieces: Sequence[_Piece]) -> None:
    """Write bytes that go to `offset` in a buffer into its pieces."""
    end = offset + len(source)
    for piece in pieces:
        first = max(offset, piece.offset)
        last = min(end, piece.offset + len(piece.bytes))
        if first < last:
            target = piece.bytes[first - piece.offset : last - piece.offset]
            target.copy_(source[first - offset : last - offset])


def _in_file(source: Tensor, directory: Path) -> Tensor:
    """Return bytes as they are mapped from a new file without a name."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(source.cpu().numpy().data)
            file.flush()
            return torch.frombuffer(mmap.mmap(file.fileno(), len(source)), dtype=torch.uint8)
    except OSError as error:
        raise ModelError(f"The base cannot be offloaded to {directory}: {error}.") from error
