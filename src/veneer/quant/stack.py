"""A stack of experts, each of them a quantized weight of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.quant.settings import Bits
from veneer.quant.weight import QuantizedLinear, QuantizedWeight


class QuantizedStack(nn.Module):
    """Stands in an experts module in place of the parameter (experts, out, in) of the same name.

    `shape` is the parameter's: (experts, in, out) where `transposed`, as gpt-oss keeps them. Each
    expert is quantized as (out, in) either way. A module's own loop works over it, since `stack[e]`
    is the dense expert as the parameter keeps it.
    """

    # Called with the experts that are used next, so that whatever reads ahead knows them.
    before_routed: Callable[[Sequence[int]], None] | None = None

    def __init__(self, experts: Sequence[QuantizedWeight], *, transposed: bool = False) -> None:
        super().__init__()
        self.experts, self.transposed = experts, transposed
        first = experts[0]
        self.dtype, self.device = first.dtype, first.device
        out, in_ = first.shape
        self.shape = torch.Size(
            (len(experts), in_, out) if transposed else (len(experts), out, in_)
        )

    @property
    def ndim(self) -> int:
        return 3

    @property
    def bits(self) -> Bits:
        return self.experts[0].bits

    @property
    def kind(self) -> str:
        return self.experts[0].kind

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of all experts."""
        return sum(expert.nbytes for expert in self.experts)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return len(self.experts)

    def expert(self, e: int) -> QuantizedWeight:
        """Return an expert's weight (out, in)."""
        return self.experts[e]

    def __getitem__(self, e: int | Tensor) -> Tensor:
        """Return an expert's dense weight as the parameter keeps it, or those of several ids."""
        if isinstance(e, Tensor) and e.ndim:
            return torch.stack([self[i] for i in e.tolist()])
        weight = self.expert(int(e)).dequantize()
        return weight.T if self.transposed else weight

    def note_routed(self, ids: Sequence[int]) -> None:
        """Take note that these experts are used next, in this order."""
        if self.before_routed is not None:
            self.before_routed(ids)

    def dense(self) -> Tensor:
        """Return all experts as the parameter keeps them, in `dtype`."""
        stack = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for e in range(len(self)):
            stack[e] = self[e]
        return stack

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {type(self.experts[0]).__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        # Codes keep their own dtype: only a change of device moves them.
        device = fn(torch.empty(0)).device
        if device != self.device:
            self.experts = [expert.to(device) for expert in self.experts]
            self.device = device
        return super()._apply(fn, recurse)


def expert_weight(
    stack: Tensor | QuantizedStack, e: int, *, transposed: bool = False
) -> Tensor | QuantizedWeight:
    """Return one expert's weight (out, in). transposed: a dense stack is (experts, in, out)."""
    if isinstance(stack, QuantizedStack):
        return stack.expert(e)
    return stack[e].T if transposed else stack[e]


def quantized_stacks(model: nn.Module) -> Mapping[str, QuantizedStack]:
    """Return the quantized stacks of a model by their paths, which are their parameters' names."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedStack)}


def quantized_modules(model: nn.Module) -> Mapping[str, QuantizedLinear | QuantizedStack]:
    """Return the quantized layers and stacks of a model by their paths, wrapped ones too."""
    kinds = (QuantizedLinear, QuantizedStack)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
