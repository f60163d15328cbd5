"""What every packed weight can do, and the linear layer over one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers unpacked at a time: 16 MB in bfloat16. With 64 tokens and the layers of a 70B model a
# product forward takes a fifth less so than with four times as many; with 512 tokens and a 7B
# model's, up to a sixth more on the way back (`python -m bench.unpack`; docs/performance.md).
BLOCK_NUMBERS = 2**23


class QuantizedWeight(ABC):
    """A weight of `shape` (out, in), never changed, which `dense()` unpacks to `dtype`."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    # Called before each use: who reads ahead learns by it where the walk through the model is.
    before_use: Callable[[], None] | None = None

    @classmethod
    @abstractmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Pack a weight (out, in), to be unpacked to `dtype`."""

    def dense(self) -> Tensor:
        """Return the weight (out, in) in `dtype`, which the caller lets go after use."""
        if self.before_use is not None:
            self.before_use()
        return self._unpack(0, self.shape[0])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight some rows at a time, with which ones they are: never all of it."""
        if self.before_use is not None:
            self.before_use()
        out, in_ = self.shape
        whole = self._whole_rows
        step = max(1, BLOCK_NUMBERS // (in_ * whole)) * whole
        for first in range(0, out, step):
            last = min(first + step, out)
            yield slice(first, last), self._unpack(first, last)

    @property
    @abstractmethod
    def _whole_rows(self) -> int:
        """Rows must be taken by so many, for scales to be whole."""

    @abstractmethod
    def _unpack(self, first: int, last: int) -> Tensor:
        """Return rows from a multiple of `_whole_rows` to another, or to the end."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, under bitsandbytes' own names: "weight", "weight.absmax", ..."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the weight on a device."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that differ from weight to weight."""
        return sum(t.nbytes for name, t in self.tensors().items() if not _is_table(name))

    def __deepcopy__(self, memo: dict) -> Self:
        return self


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return a weight that may be packed as a tensor."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, (tokens, out), in x's dtype. x (tokens, in)."""
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    y = product(x, weight, x.new_empty(len(x), weight.shape[0]))
    return y if bias is None else y.add_(bias)


def product(x: Tensor, weight: Tensor | QuantizedWeight, out: Tensor) -> Tensor:
    """Write x Wᵀ, (tokens, out), to `out` and return it. x (tokens, in), all of W's dtype."""
    if isinstance(weight, Tensor):
        return torch.mm(x, weight.T, out=out)
    for rows, values in weight.blocks():
        torch.mm(x, values.to(x.dtype).T, out=out[:, rows])
    return out


def product_back(dy: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """Return dy W, (tokens, in). dy (tokens, out)."""
    if isinstance(weight, Tensor):
        return dy @ weight.to(dy.dtype)
    total = None
    for rows, values in weight.blocks():
        part = dy[:, rows] @ values.to(dy.dtype)
        if len(values) == weight.shape[0]:
            return part
        # Parts are added up in float32 or wider, or each sum would be rounded again.
        wide = torch.promote_types(dy.dtype, torch.float32)
        total = part.to(wide) if total is None else total.add_(part)
    assert total is not None
    return total.to(dy.dtype)


def row_squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return ‖w‖² of each row w of a weight (out, in), (out,), in float32 or wider."""
    if isinstance(weight, QuantizedWeight):
        return torch.cat([row_squares(values) for _, values in weight.blocks()])
    wide = torch.promote_types(weight.dtype, torch.float32)
    step = max(1, BLOCK_NUMBERS // weight.shape[1])  # a wide copy of all would be the largest thing
    return torch.cat([rows.to(wide).square().sum(1) for rows in weight.split(step)])


class QuantizedLinear(nn.Module):
    """y = x Ŵᵀ + b, with Ŵ unpacked in the forward pass, and again in the backward pass.

    `stands_for` is the layer that this one takes the place of, whose own weight is not looked at;
    `transposed` if that would be (in, out), as in transformers' Conv1D.
    """

    def __init__(
        self, packed: QuantizedWeight, stands_for: nn.Module, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.packed = packed
        self.transposed = transposed
        bias = stands_for.bias
        self.bias = nn.Parameter(bias.detach(), False) if isinstance(bias, Tensor) else None
        self.out_features, self.in_features = packed.shape
        self._stands_for = (stands_for,)  # in a tuple, for it is no part of this layer

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), unpacked anew at each look."""
        return self.packed.dense()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = _QuantizedProduct.apply(flat, self.packed, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def plain(self, weight: Tensor | None = None) -> nn.Module:
        """Return the layer that this one stands for, with `weight` (out, in) or its own."""
        weight = self.packed.dense() if weight is None else weight
        weight = weight.T.contiguous() if self.transposed else weight
        layer = copy.copy(self._stands_for[0])
        layer._parameters = {"weight": nn.Parameter(weight, False), "bias": self.bias}
        return layer.train(self.training)

    def extra_repr(self) -> str:
        kind = type(self.packed).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # What is packed has a number format of its own; of a move, only the device concerns it.
        self.packed = self.packed.to(fn(torch.empty(0)).device)
        return super()._apply(fn, recurse)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return linear(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        d_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return product_back(dy, ctx.packed), None, d_bias


def quantized_layers(model: nn.Module) -> Mapping[str, QuantizedLinear]:
    """Return the packed layers of a model by their paths, whatever lies over them."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _is_table(name: str) -> bool:
    # The same for every weight, or the shape in words.
    return name.endswith("quant_map") or ".quant_state." in name
