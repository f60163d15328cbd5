"""decode.cpp from Python: one step of many rows through all layers, on a CPU.

The structures are those of decode.cpp, field by field. They hold addresses: whoever makes them
keeps the tensors alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.native import NAMES, library_of

LINEARS = 7  # of a decoder layer: q, k, v, o, gate, up, down
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # those that share an input
NUMBERS, FOUR_BITS, EIGHT_BITS = 0, 1, 2  # kinds of weights
KEYS = 16  # that are interleaved in a row's cache, dimension by dimension
OUTPUTS = 32  # rows of a weight that one thread multiplies with at a time
DTYPES = (torch.bfloat16, torch.float32)
_Address, _Size, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Linear(ctypes.Structure):
    """A weight (out, in) of numbers, or of codes with their scales and values; bias or null."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "bias", "scales", "values")),
        *((name, _Size) for name in ("out", "in_", "kind")),
    )


class Update(ctypes.Structure):
    """The low-rank update of a linear layer: A (rank, in), B (rank, out), gain (out) in float32 or
    null for 1."""

    _fields_ = (("A", _Address), ("B", _Address), ("gain", _Address), ("rank", _Size))


class Layer(ctypes.Structure):
    """A decoder layer; window 0 sees all keys."""

    _fields_ = (
        ("first_norm", _Address),
        ("second_norm", _Address),
        ("linears", Linear * LINEARS),
        ("scale", _Real),
        ("first_eps", _Real),
        ("second_eps", _Real),
        ("window", _Size),
    )


class Shape(ctypes.Structure):
    """What all layers share; widest: the longest row of any weight."""

    _fields_ = tuple(
        (name, _Size)
        for name in ("layers", "dim", "inner", "heads", "shared_heads", "head_dim", "widest")
    )


class KVCache(ctypes.Structure):
    """A row's keys (layers, heads, capacity / 16, head_dim, 16) and values (layers, heads,
    capacity, head_dim); capacity in tokens."""

    _fields_ = (("keys", _Address), ("values", _Address), ("capacity", _Size))


class Batch(ctypes.Structure):
    """For each token its row's cache, its position, and its updates, (layers, LINEARS), or null.

    ranks: the largest sum of ranks over the linear layers of one group.
    """

    _fields_ = (
        ("tokens", _Size),
        ("caches", _Address),
        ("positions", _Address),
        ("updates", _Address),
        ("ranks", _Size),
    )


class Workspace(ctypes.Structure):
    """Buffers for intermediate results."""

    _fields_ = (
        *((n, _Address) for n in ("normed", "q", "k", "v", "attended", "gate", "up")),
        *((n, _Address) for n in ("h", "scores", "rows")),
        ("capacity", _Size),
    )


class Decode:
    """The compiled functions for one dtype. Raises OSError where there are none."""

    def __init__(self, dtype: torch.dtype) -> None:
        library, why_not = library_of("decode")
        if library is None or dtype not in DTYPES:
            raise OSError(why_not or f"no compiled step computes in {dtype}")
        self._step: Callable[..., None] = _without_result(library, f"step_{NAMES[dtype]}")
        self._product: Callable[..., None] = _without_result(library, f"product_{NAMES[dtype]}")

    def step(
        self,
        layers: Any,
        shape: Shape,
        batch: Batch,
        workspace: Workspace,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> None:
        """Take x (tokens, dim) through all layers, in place. angles: cos and sin of each position,
        (positions, head_dim)."""
        cos, sin = (ctypes.c_void_p(angle.data_ptr()) for angle in angles)
        structures = (ctypes.byref(structure) for structure in (shape, batch, workspace))
        threads = _Size(torch.get_num_threads())
        self._step(layers, *structures, ctypes.c_void_p(x.data_ptr()), cos, sin, threads)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x Wᵀ (tokens, out) in float32. x (tokens, in), W (out, in)."""
        y = torch.empty(len(x), len(weight), dtype=torch.float32)
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, y))
        sizes = (_Size(n) for n in (*y.shape, x.shape[1], torch.get_num_threads()))
        self._product(*addresses, *sizes)
        return y


def _without_result(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library, name)
    function.restype = None  # type: ignore[attr-defined]
    return function
