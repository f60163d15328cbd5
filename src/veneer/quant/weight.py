"""What every quantized weight can do, the products with one, and the linear layer over one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import ModelError

# Numbers dequantized at a time: 16 MB in bfloat16. With 64 tokens and the layers of a 70B model a
# product forward takes a fifth less so than with four times as many; with 512 tokens and a 7B
# model's, up to a sixth more on the way back (`python -m bench.dequantize`; docs/performance.md).
BLOCK_NUMBERS = 2**23


class QuantizedWeight(ABC):
    """A weight of `shape` (out, in) that never changes; `dequantize()` returns it in `dtype`."""

    bits: int  # of a code, without what scales add
    kind: str  # as its format calls it: nf4, fp4, int8, Q4_K
    # Whether the codes are the base itself, as it was published, and nothing was rounded here.
    published: bool = False
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    # Called before each use, so that whatever reads ahead knows where in the model a pass is.
    before_use: Callable[[], None] | None = None

    def requantized(self, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight | None:
        """Return another weight (out, in) quantized as this one is, or None where Veneer cannot."""
        return None

    @property
    def label(self) -> str:
        """What people call the format."""
        return type(self).__name__

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in `dtype`, a new tensor for the caller to drop after use."""
        if self.before_use is not None:
            self.before_use()
        return self._dequantize_rows(0, self.shape[0])

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows, (rows, in), in `dtype`; index (rows,) in int64."""
        picked = [torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)]
        for row in index.tolist():
            first = row // self._row_unit * self._row_unit
            last = min(first + self._row_unit, self.shape[0])
            picked.append(self._dequantize_rows(first, last)[row - first, None])
        return torch.cat(picked)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows with these rows in `dtype`, of BLOCK_NUMBERS numbers at most."""
        if self.before_use is not None:
            self.before_use()
        out, in_ = self.shape
        unit = self._row_unit
        step = max(1, BLOCK_NUMBERS // (in_ * unit)) * unit
        for first in range(0, out, step):
            last = min(first + step, out)
            yield slice(first, last), self._dequantize_rows(first, last)

    def product_of_few(self, x: Tensor) -> Tensor | None:
        """Return x Wᵀ, (tokens, out), by a kernel that reads the codes themselves, or None where
        there is none. x (tokens, in), of W's dtype."""
        return None

    @property
    @abstractmethod
    def _row_unit(self) -> int:
        """The fewest rows that begin and end with blocks of scales."""

    @abstractmethod
    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return rows first to last, each a multiple of `_row_unit` or the end."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by bitsandbytes' names: "weight", "weight.absmax", ..."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the weight on a device."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, without the table that all weights share."""
        return sum(t.nbytes for name, t in self.tensors().items() if not _is_table(name))

    def __deepcopy__(self, memo: dict) -> Self:
        return self


def kept_weight(layer: Any) -> Tensor | QuantizedWeight:
    """Return a layer's weight as the layer keeps it, which has its shape, dtype and device.

    `layer.weight` has them too, but of a quantized layer it is dequantized whole at each access.
    """
    quantized: QuantizedWeight | None = getattr(layer, "quantized_weight", None)
    return layer.weight if quantized is None else quantized


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return a weight that may be quantized as a tensor."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


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
    if (y := weight.product_of_few(x)) is not None:
        return out.copy_(y)
    for rows, values in weight.blocks():
        torch.mm(x, values.to(x.dtype).T, out=out[:, rows])
    return out


def product_back(dy: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """Return dy W, (tokens, in). dy (tokens, out)."""
    if isinstance(weight, Tensor):
        return dy @ weight.to(dy.dtype)
    total = None
    for rows, values in weight.blocks():
        summand = dy[:, rows] @ values.to(dy.dtype)
        if len(values) == weight.shape[0]:
            return summand
        # They are added up in float32 or wider, or each sum would be rounded again.
        wide = torch.promote_types(dy.dtype, torch.float32)
        total = summand.to(wide) if total is None else total.add_(summand)
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
    """y = x Ŵᵀ + b, with Ŵ dequantized in the forward pass, and again in the backward pass.

    `replaces` is the dense layer whose place this one takes; its weight is not used. `transposed`
    says that it keeps its weight as (in, out), as transformers' Conv1D does.
    """

    def __init__(
        self, quantized_weight: QuantizedWeight, replaces: nn.Module, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.quantized_weight = quantized_weight
        self.transposed = transposed
        bias = replaces.bias
        self.bias = nn.Parameter(bias.detach(), False) if isinstance(bias, Tensor) else None
        self.out_features, self.in_features = quantized_weight.shape
        self._replaces = (replaces,)  # in a tuple, so that it is no submodule

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantized anew at each access."""
        return self.quantized_weight.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = _QuantizedProduct.apply(flat, self.quantized_weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def to_dense(self, weight: Tensor | None = None) -> nn.Module:
        """Return the dense layer that this one replaces, with `weight` (out, in) or Ŵ."""
        weight = self.weight if weight is None else weight
        weight = weight.T.contiguous() if self.transposed else weight
        layer = copy.copy(self._replaces[0])
        layer._parameters = {"weight": nn.Parameter(weight, False), "bias": self.bias}
        return layer.train(self.training)

    def extra_repr(self) -> str:
        kind = self.quantized_weight.label
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Codes keep their own dtype: only a change of device moves them.
        self.quantized_weight = self.quantized_weight.to(destination(fn, self.quantized_weight))
        return super()._apply(fn, recurse)


def destination(fn: Callable[[Tensor], Tensor], weight: Any) -> torch.device:
    """Return the device to which a module's `_apply(fn)` moves quantized weights.

    Raises ModelError for the meta device, from where other programs fill parameters alone again.
    """
    device = fn(torch.empty(0)).device
    if device.type == "meta" and weight.device.type != "meta":
        raise ModelError(
            "Quantized weights would be lost on the meta device. Where accelerate asks for it, set "
            "fsdp_cpu_ram_efficient_loading: false in its configuration."
        )
    return device


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        d_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return product_back(dy, ctx.weight), None, d_bias


def quantized_layers(model: nn.Module) -> Mapping[str, QuantizedLinear]:
    """Return the quantized layers of a model by their paths, wrapped ones too."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _is_table(name: str) -> bool:
    # The table of 16 values is the same for every weight; the state is its shape as text.
    return name.endswith("quant_map") or ".quant_state." in name
