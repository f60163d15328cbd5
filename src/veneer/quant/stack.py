"""A stack of experts, each of them a quantized weight of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.weight import QuantizedLinear, QuantizedWeight, destination


class LazyExperts(Sequence[QuantizedWeight]):
    """Experts of a stored stack, each made when it is first used."""

    def __init__(self, count: int, make: Callable[[int], QuantizedWeight]) -> None:
        self._made: list[QuantizedWeight | None] = [None] * count
        self._make = make

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, e: Any) -> Any:
        if isinstance(e, slice):
            return [self[i] for i in range(*e.indices(len(self)))]
        expert = self._made[e]
        if expert is None:
            expert = self._made[e] = self._make(range(len(self))[e])
        return expert

    def __deepcopy__(self, memo: dict) -> LazyExperts:
        return self


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
    def bits(self) -> int:
        return self.experts[0].bits

    @property
    def kind(self) -> str:
        return self.experts[0].kind

    @property
    def published(self) -> bool:
        return self.experts[0].published

    @property
    def label(self) -> str:
        return self.experts[0].label

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of all experts, which all have the same."""
        return len(self) * self.experts[0].nbytes

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

    def requantized(self, weight: Tensor, dtype: torch.dtype) -> QuantizedStack | None:
        """Return another stack quantized as this one is, or None where Veneer cannot."""
        experts = []
        for old, new in zip(self.experts, weight, strict=True):
            expert = old.requantized((new.T if self.transposed else new).contiguous(), dtype)
            if expert is None:
                return None
            experts.append(expert)
        return QuantizedStack(experts, transposed=self.transposed)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all experts, each name after the expert's number."""
        return {
            f"{e}.{name}": tensor
            for e, expert in enumerate(self.experts)
            for name, tensor in expert.tensors().items()
        }

    def dense(self) -> Tensor:
        """Return all experts as the parameter keeps them, in `dtype`."""
        stack = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for e in range(len(self)):
            stack[e] = self[e]
        return stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute what code does with the whole parameter over all experts, dense for that long."""
        args = [x.dense() if isinstance(x, QuantizedStack) else x for x in args]
        kwargs = {
            name: x.dense() if isinstance(x, QuantizedStack) else x
            for name, x in (kwargs or {}).items()
        }
        return func(*args, **kwargs)

    def transpose(self, first: int, second: int) -> Tensor:
        return self.dense().transpose(first, second)

    def __deepcopy__(self, memo: dict) -> QuantizedStack:
        # The experts never change, and whoever reads ahead stays the same.
        stack = type(self)(self.experts, transposed=self.transposed)
        stack.before_routed = self.before_routed
        return stack

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.label}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        # Codes keep their own dtype: only a change of device moves them.
        device = destination(fn, self)
        if device != self.device:
            self.experts = [expert.to(device) for expert in self.experts]
            self.device = device
        return super()._apply(fn, recurse)


QuantizedModule = QuantizedLinear | QuantizedEmbedding | QuantizedStack


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


def quantized_weights(model: nn.Module) -> Mapping[str, QuantizedWeight | QuantizedStack]:
    """Return what is quantized of a model by the paths of the modules that keep it."""
    return {
        path: module if isinstance(module, QuantizedStack) else module.quantized_weight
        for path, module in quantized_modules(model).items()
    }


def quantized_modules(model: nn.Module) -> Mapping[str, QuantizedModule]:
    """Return the quantized layers and stacks of a model by their paths, wrapped ones too."""
    kinds = (QuantizedLinear, QuantizedEmbedding, QuantizedStack)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
