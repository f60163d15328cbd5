"""LoRA over a parameter that no layer of its own multiplies with, such as a stack of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.adapter.active import ActiveAdapters, Segments
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.experts import (
    compute_dtype,
    has_experts,
    recognised_experts,
    routed_experts,
    why_not_by_rows,
)
from veneer.adapter.wrapper import Wrapper, is_intercepted
from veneer.errors import AdapterError
from veneer.lowrank.expert_stacks import SegmentUpdates, StackUpdate, TokenUpdates
from veneer.lowrank.formula import delta_weight, merged_weight, new_A
from veneer.lowrank.update import LowRankUpdate, mixed
from veneer.quant.stack import QuantizedStack, expert_weight
from veneer.quant.weight import QuantizedWeight, dense

# The submodule of a LoRAParameters that holds the adapted ones; checkpoints have it in their keys.
PARAMETERS = "parts"


class LoRAParameters(Wrapper):
    """A module with adapted parameters.

    The experts of a mixture that are recognised (adapter/experts.py) add B A x on the rows that
    each expert gets. Any other module computes with W + Σ scaling · B A, a sum that is made anew in
    each forward pass, as large as W itself.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.add_module(PARAMETERS, nn.ModuleDict())

    @property
    def adapted(self) -> nn.ModuleDict:
        """The adapted parameters, by their names."""
        parameters = self._modules[PARAMETERS]
        assert isinstance(parameters, nn.ModuleDict)
        return parameters

    def adapt(self, name: str, active_adapters: ActiveAdapters) -> AdaptedParameter:
        """Return the adapted parameter of this name, made if need be."""
        if name not in self.adapted:
            self.adapted[name] = AdaptedParameter(self.original, name, active_adapters)
        parameter = self.adapted[name]
        assert isinstance(parameter, AdaptedParameter)
        return parameter

    @property
    def acting(self) -> dict[str, AdaptedParameter]:
        """The parameters that an active adapter changes, by their names."""
        return {
            name: parameter
            for name, parameter in self.adapted.items()
            if isinstance(parameter, AdaptedParameter) and parameter.acts
        }

    @property
    def reason(self) -> str | None:
        """Why the module computes with W + Σ scaling · B A; None for routed experts."""
        recognised = recognised_experts(self.original)
        if isinstance(recognised, str):
            return recognised
        others = self.adapted.keys() - {recognised.up, recognised.down}
        return f"{', '.join(sorted(others))} is adapted too" if others else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.acting
        if not acting:
            return self.original(*args, **kwargs)
        y = self.routed(args, kwargs, exact=True)
        if y is not None:
            return y
        changed = {name: parameter.changed() for name, parameter in acting.items()}
        with _tensors_for_stacks(self.original, changed):
            return functional_call(self.original, changed, args, kwargs)

    def routed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> Tensor | None:
        """Return the output of routed experts, or None where this is something else, or somebody
        waits for a call of the original. options: those of `routed_experts`."""
        acting = self.acting
        # A router has one matrix for all tokens, and so have biases, and no update of a stack.
        if is_intercepted(self.original) or any(len(p.shape) != 3 for p in acting.values()):
            return None
        inputs = (*args, *kwargs.values())
        updates = {name: p.stack_update(*inputs[:1]) for name, p in acting.items()}
        return routed_experts(self.original, updates, inputs, **options)


@contextmanager
def _tensors_for_stacks(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module have parameters in place of its quantized stacks of these names."""
    modules = module._modules
    stacks = [name for name in tensors if name in modules]
    module._modules = {name: child for name, child in modules.items() if name not in stacks}
    module._parameters |= {name: nn.Parameter(tensors[name].detach(), False) for name in stacks}
    try:
        yield
    finally:
        for name in stacks:
            del module._parameters[name]
        module._modules = modules


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the path of each module with stacks of experts in a model, with the module, and why its
    routed experts are not computed as one function, or None where they are."""
    wrapped = set()
    for path, module in model.named_modules():
        if isinstance(module, LoRAParameters):
            wrapped.add(module.original)
            if any(getattr(module.original, name).ndim == 3 for name in module.adapted):
                yield path, module, module.reason
        elif has_experts(module) and module not in wrapped:
            recognised = recognised_experts(module)
            yield path, module, recognised if isinstance(recognised, str) else None


class AdaptedParameter(Adapted):
    """One parameter W of `owner`, (out, in) or a stack of experts (experts, out, in).

    A module that says `is_transposed` keeps its experts as (experts, in, out).
    """

    def __init__(self, owner: nn.Module, name: str, active_adapters: ActiveAdapters) -> None:
        super().__init__(active_adapters)
        self.name = name
        self._owner = (owner,)  # in a tuple, so that it is no submodule of this one
        self.training = owner.training

    @property
    def base_weight(self) -> Tensor:
        weight = self._stored_weight
        return self.oriented(weight.dense() if isinstance(weight, QuantizedStack) else weight)

    @property
    def _stored_weight(self) -> Tensor | QuantizedStack:
        weight: Tensor | QuantizedStack = getattr(self._owner[0], self.name)
        return weight

    @property
    def shape(self) -> torch.Size:
        weight = self._stored_weight
        if not self._is_transposed:
            return weight.shape
        return torch.Size((*weight.shape[:-2], weight.shape[-1], weight.shape[-2]))

    @property
    def device(self) -> torch.device:
        return self._stored_weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which A and B are multiplied outside of training."""
        return self._stored_weight.dtype

    @property
    def _is_transposed(self) -> bool:
        transposed = getattr(self._owner[0], "is_transposed", False)
        return bool(transposed) and self._stored_weight.ndim == 3

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if self._is_transposed else weight

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        *experts, out, in_ = self.shape
        rank, single = config.rank_of(path), config.shared_expert_a or not experts
        As = [new_A(rank, in_, config.init, generator) for _ in range(1 if single else experts[0])]
        A = As[0] if single else torch.stack(As)
        adapter = Adapter(A, torch.zeros(*experts, out, rank), scaling=config.scaling_of(path))
        adapter.lora_A.requires_grad_(not config.lora_fa)
        self.attach(name, adapter)

    @property
    def acts(self) -> bool:
        if (segments := self.active_adapters.segments) is not None:
            return any(name in self.adapters for name, *_ in segments.of_adapters)
        row_updates = self.active_adapters.row_updates
        return bool(self.active() if row_updates is None else row_updates.on(self))

    def acts_by_rows(self) -> bool:
        """Return whether each row of a batch may have an adapter of its own here."""
        return why_not_by_rows(self._owner[0], self.name) is None

    def why_not_by_segments(self) -> str | None:
        """Return why an adapter cannot act here on some tokens of a batch alone, in training."""
        if self.device.type != "cpu":
            return "one product computes all experts on a card"
        return why_not_by_rows(self._owner[0], self.name)

    def low_rank_update(
        self, pairs: list[tuple[Adapter, float]], dtype: torch.dtype
    ) -> LowRankUpdate:
        """Return adapters with their weights as one update, differentiably."""
        As, Bs = zip(*(adapter.factors() for adapter, _ in pairs), strict=True)
        updates = [LowRankUpdate(A.to(dtype), B, None) for A, B in zip(As, Bs, strict=True)]
        return mixed(updates, [w for _, w in pairs], [adapter.scaling for adapter, _ in pairs])

    def stack_update(self, x: Tensor) -> StackUpdate | SegmentUpdates | TokenUpdates:
        """Return what adapters add to each expert of a stack, for x (tokens, dim)."""
        if (segments := self.active_adapters.segments) is not None:
            return self._by_segments(x, segments)
        row_updates = self.active_adapters.row_updates
        if row_updates is None:
            return _stack_update(self.low_rank_update(self.active(), compute_dtype(x)))
        updates = row_updates.on(self)
        mixes, rows = row_updates.numbers_on(x.device), len(row_updates.mix_of_row)
        which = torch.full_like(mixes, -1)
        for number, each in enumerate(updates):
            which.masked_fill_(mixes == each.mix, number)
        tokens = which[:, None].expand(rows, len(x) // rows).flatten()
        return TokenUpdates([_stack_update(each.update) for each in updates], tokens)

    def _by_segments(self, x: Tensor, segments: Segments) -> SegmentUpdates:
        """Return the updates that each act on their own tokens of a batch, x (tokens, dim)."""
        segments.check(x, self.name)
        return SegmentUpdates(
            [
                (tokens, _stack_update(self.low_rank_update(pairs, compute_dtype(x))))
                for name, tokens, _ in segments.of_adapters
                if (pairs := self.named([(name, 1.0)]))
            ]
        )

    def changed(self) -> Tensor:
        """Return W + Σ w s B A as the owner keeps it, differentiably, in W's dtype."""
        if self.active_adapters.segments is not None:
            raise AdapterError(f"{self.name} has one weight for all tokens of a batch.")
        total = self.base_weight
        for adapter, weight in self.active():
            A, B = (factor.to(total.dtype) for factor in adapter.factors())
            total = total + (weight * adapter.scaling) * (B @ A)
        return self.stored(total)

    def path_in_base(self, path: str) -> str:
        owner, _, name = path.rpartition(f".{PARAMETERS}.")
        return f"{owner}.{name}"

    def unwrap(self, model: nn.Module, path: str, *, merged: bool = False) -> None:
        owner, _, name = path.rpartition(".")
        wrapper = model.get_submodule(owner)
        assert isinstance(wrapper, LoRAParameters)
        if merged:
            weight = self._merged()
            self._owner[0]._modules.pop(name, None)  # a quantized stack
            self._owner[0]._parameters[name] = nn.Parameter(weight, False)
        del wrapper.adapted[name]
        if not wrapper.adapted:
            model.set_submodule(owner, wrapper.original)

    def changes(self) -> Iterator[tuple[Tensor | QuantizedWeight, Tensor]]:
        weight = self._stored_weight
        if weight.ndim != 3:
            yield from super().changes()
            return
        active = [(*adapter.factors(), share * adapter.scaling) for adapter, share in self.active()]
        for e in range(len(weight)):
            W = expert_weight(weight, e, transposed=self._is_transposed)
            total = torch.zeros(W.shape, dtype=torch.float32, device=self.device)
            for A, B, scaling in active:
                own = A if A.ndim == 2 else A[e]
                total += delta_weight(own.detach(), B[e].detach(), scaling)
            yield W, total

    def matrices_in(self, plain: nn.Module, path: str) -> Iterator[Tensor]:
        weight = self.weight_in(plain, path)
        yield from weight if weight.ndim == 3 else [weight]

    def _merged(self) -> Tensor:
        """Return W + Σ w s B A as the owner keeps it, rounded once; made expert by expert."""
        merged = torch.empty(self.shape, dtype=self._stored_weight.dtype, device=self.device)
        merged = self.stored(self.stored(merged).contiguous())  # whose memory is the owner's way
        for own, (weight, delta) in zip(
            merged if merged.ndim == 3 else [merged], self.changes(), strict=True
        ):
            own.copy_(merged_weight(dense(weight), delta))
        return self.stored(merged)

    def weight_in(self, plain: nn.Module, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        weight = getattr(plain.get_submodule(owner), name)
        return self.oriented(weight.dense() if isinstance(weight, QuantizedStack) else weight)


def _stack_update(update: LowRankUpdate) -> StackUpdate:
    return StackUpdate(update.A, update.B.transpose(1, 2).contiguous())
