"""Whether the frozen base is still, bit for bit, what it was when a run began.

Memory fails without a word, and code around a run may write where it should not. The base's weights
are added up as 64-bit integers, a piece at a time: one flipped bit changes its piece's sum. At each
checkpoint some pieces are added up again, other ones each time; at the end all of them are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.models.block_buffers import passes_of
from veneer.models.fingerprint import base_parameters
from veneer.quant.mapped import are_mapped, release
from veneer.quant.stack import QuantizedStack, quantized_modules

PIECE = 2**26  # bytes of one sum: 64 MB
AT_ONCE = 2**30  # bytes that a checkpoint looks at, which takes a tenth of a second or two


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some bytes of a frozen tensor, and their sum. is_mapped: from a file that may be larger than
    memory, of which no more is kept than was there before."""

    name: str
    tensor: Tensor
    start: int
    bytes: int
    is_mapped: bool
    sum: Tensor

    def is_as_it_was(self) -> bool:
        trains = isinstance(self.tensor, nn.Parameter) and self.tensor.requires_grad
        return trains or not _is_here(self.tensor) or bool(self._sum_now() == self.sum)

    def _sum_now(self) -> Tensor:
        return _sum(_bytes(self.tensor)[self.start :][: self.bytes], is_mapped=self.is_mapped)


class FrozenBase:
    """The sums of a base's frozen weights as they are when this is made.

    What is mapped from files is read once for that, as each pass of the model reads it. Left out is
    what is not on the device now, and the quantized weights of a base that is sharded or read block
    by block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pieces: list[_Piece] = []
        self._next = 0
        for name, tensor, is_mapped in _frozen(model):
            flat = _bytes(tensor)
            for start in range(0, len(flat), PIECE):
                piece = flat[start : start + PIECE]
                whole = _sum(piece, is_mapped=is_mapped)
                self._pieces.append(_Piece(name, tensor, start, len(piece), is_mapped, whole))

    @property
    def bytes(self) -> int:
        """How many bytes are watched."""
        return sum(piece.bytes for piece in self._pieces)

    def changed(self, *, all: bool = False) -> list[str]:
        """Return the weights that have changed, of those whose turn it is, or of all."""
        names: dict[str, None] = {}
        left = self.bytes if all else AT_ONCE
        for _ in self._pieces:
            piece = self._pieces[self._next % len(self._pieces)]
            if left <= 0:
                break
            self._next += 1
            left -= piece.bytes
            if not piece.is_as_it_was():
                names[piece.name] = None
        return sorted(names)


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the base's frozen tensors that are in memory, or mapped into it, by name, and whether
    they are what nobody but `veneer.quant.mapped` has mapped: pages of other weights may have been
    written to since, and would lose that when they are released."""
    for name, weight in base_parameters(model).items():
        if not weight.requires_grad and weight.is_contiguous() and _is_here(weight):
            yield name, weight, False
    quantized = [
        (name, tensor)
        for name, tensor in quantized_tensors(model)
        if tensor.is_contiguous() and _is_here(tensor)
    ]
    mapped = are_mapped([tensor for _, tensor in quantized])
    for (name, tensor), is_mapped in zip(quantized, mapped, strict=True):
        yield name, tensor, is_mapped


def quantized_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield codes and scales of the base, by name; none where a block is filled only when it is
    used, since between its uses they have no memory to be read from."""
    if passes_of(model) is not None:
        return
    for path, module in quantized_modules(model).items():
        if not isinstance(module, QuantizedStack):  # its experts are made when they are used
            for name, tensor in module.quantized_weight.tensors().items():
                yield f"{path}.{name}", tensor


def _is_here(tensor: Tensor) -> bool:
    """Return whether a tensor has memory: that of sharded and offloaded bases comes and goes."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() >= tensor.nbytes


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _sum(flat: Tensor, *, is_mapped: bool) -> Tensor:
    """Return the sum of bytes as 64-bit integers, which wrap around. flat (bytes,)"""
    whole = len(flat) // 8 * 8
    numbers = flat
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        numbers = flat.clone()
    result = numbers[:whole].view(torch.int64).sum() + flat[whole:].to(torch.int64).sum()
    if is_mapped:
        release([flat])
    return result
