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

# The linear layers of a decoder layer: three or one that give q, k and v; the attention's output;
# two or one that give gate and up; down. Groups share an input.
ATTENTION_INPUTS, OUTPUT, INNER_INPUTS, DOWN, LINEARS = 0, 3, 4, 6, 7
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
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
    null for 1, what is added to the layer's bias (out) in float32 or null."""

    _fields_ = (*((name, _Address) for name in ("A", "B", "gain", "bias")), ("rank", _Size))


class Norm(ctypes.Structure):
    """A norm over `dim` numbers; bias or null. Without dim there is no norm."""

    _fields_ = (
        *((name, _Address) for name in ("weight", "bias")),
        *((name, _Real) for name in ("offset", "eps")),
        *((name, _Size) for name in ("dim", "centred", "rounds")),
    )


class Norms(ctypes.Structure):
    """The norms of a decoder layer."""

    _fields_ = tuple(
        (name, Norm)
        for name in (
            *("before_attention", "of_q", "of_k", "after_attention"),
            *("before_feed_forward", "after_feed_forward"),
        )
    )


class Layer(ctypes.Structure):
    """A decoder layer. cos, sin (positions, pairs); q_factors (positions,) or null; sinks (heads,)
    in float32 or null; softcap 0 is none, window 0 sees all keys. attention_inputs, inner_inputs:
    how many linear layers give q, k and v, and gate and up."""

    _fields_ = (
        ("norms", Norms),
        ("linears", Linear * LINEARS),
        *((name, _Address) for name in ("cos", "sin", "q_factors", "sinks")),
        *((name, _Real) for name in ("scale", "softcap", "multiplier")),
        *((name, _Size) for name in ("window", "pairs", "adjacent", "by_key_head")),
        *((name, _Size) for name in ("attention_inputs", "inner_inputs")),
        *((name, _Size) for name in ("gate_first", "activation", "parallel")),
    )


class Shape(ctypes.Structure):
    """What all layers share. inner_columns: of gate and up together; widest: the longest row of any
    weight."""

    _fields_ = tuple(
        (name, _Size)
        for name in (
            *("layers", "dim", "inner", "inner_columns"),
            *("heads", "key_heads", "head_dim", "value_dim", "widest"),
        )
    )


class KVCache(ctypes.Structure):
    """A row's keys (layers, key_heads, capacity / 16, head_dim, 16) and values (layers, key_heads,
    capacity, value_dim); capacity in tokens."""

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
        *((n, _Address) for n in ("normed", "qkv", "attended", "gate_up", "activated")),
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
        self, layers: Any, shape: Shape, batch: Batch, workspace: Workspace, x: Tensor
    ) -> None:
        """Take x (tokens, dim) through all layers, in place."""
        structures = (ctypes.byref(structure) for structure in (shape, batch, workspace))
        threads = _Size(torch.get_num_threads())
        self._step(layers, *structures, ctypes.c_void_p(x.data_ptr()), threads)

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        """Return W x + b (tokens, out) in float32 for x (tokens, in), contiguous."""
        y = torch.empty(len(x), linear.out, dtype=torch.float32)
        x_address, y_address = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
        sizes = (_Size(n) for n in (len(x), torch.get_num_threads()))
        self._product(x_address, ctypes.byref(linear), y_address, *sizes)
        return y


def _without_result(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library, name)
    function.restype = None  # type: ignore[attr-defined]
    return function
