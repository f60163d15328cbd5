"""Quantized weights that share an input, such as an expert's gate and up, as one weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from veneer.quant.weight import QuantizedWeight


class JoinedRows(QuantizedWeight):
    """The rows of several weights (out, in) below each other; each keeps its own codes and scales.

    Files have gate and up of an expert as two weights, while the module has them in one.
    """

    def __init__(self, pieces: Sequence[QuantizedWeight]) -> None:
        self.pieces = tuple(pieces)
        first = self.pieces[0]
        self.bits, self.kind, self.published = first.bits, first.kind, first.published
        self.dtype, self.device = first.dtype, first.device
        rows = sum(piece.shape[0] for piece in self.pieces)
        self.shape = torch.Size((rows, first.shape[1]))

    @property
    def label(self) -> str:
        return self.pieces[0].label

    def requantized(self, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight | None:
        pieces = [
            piece.requantized(weight[rows].contiguous(), dtype) for rows, piece in self._places()
        ]
        quantized = [piece for piece in pieces if piece is not None]
        return JoinedRows(quantized) if len(quantized) == len(pieces) else None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.before_use is not None:
            self.before_use()
        for place, piece in self._places():
            for rows, values in piece.blocks():
                yield slice(place.start + rows.start, place.start + rows.stop), values

    @property
    def _row_unit(self) -> int:
        return self.shape[0]

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        assert (first, last) == (0, self.shape[0])  # all: `blocks` goes by pieces
        values = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for rows, piece in self._places():
            values[rows] = piece.dequantize()
        return values

    def _places(self) -> Iterator[tuple[slice, QuantizedWeight]]:
        ends = accumulate(piece.shape[0] for piece in self.pieces)
        for end, piece in zip(ends, self.pieces, strict=True):
            yield slice(end - piece.shape[0], end), piece

    def rows(self, index: Tensor) -> Tensor:
        values = torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        for place, piece in self._places():
            here = (index >= place.start) & (index < place.stop)
            if bool(here.any()):
                values[here] = piece.rows(index[here] - place.start)
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all pieces, each name after the piece's number."""
        return {
            f"{number}.{name}": tensor
            for number, piece in enumerate(self.pieces)
            for name, tensor in piece.tensors().items()
        }

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        return type(self)([piece.to(device) for piece in self.pieces])


def joined(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return pieces as one weight; a single piece as it is."""
    return pieces[0] if len(pieces) == 1 else JoinedRows(pieces)


def piece_tensors(weight: QuantizedWeight) -> list[Mapping[str, Tensor]]:
    """Return the tensors of each piece of a weight, or of the whole weight."""
    pieces = weight.pieces if isinstance(weight, JoinedRows) else (weight,)
    return [piece.tensors() for piece in pieces]
