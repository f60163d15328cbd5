"""LoRA over a parameter that no layer of its own multiplies with, such as a stack of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.wrapper import Wrapper
from veneer.lowrank.formula import merged_weight, new_A

# The submodule of a LoRAParameters that holds the adapted ones; checkpoints have it in their keys.
PARAMETERS = "parts"


class LoRAParameters(Wrapper):
    """A module with adapted parameters: it computes with W + Σ scaling · B A.

    The sum is made anew in each forward pass, as large as W itself.
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {
            name: parameter.changed()
            for name, parameter in self.adapted.items()
            if isinstance(parameter, AdaptedParameter) and parameter.active()
        }
        if not changed:
            return self.original(*args, **kwargs)
        return functional_call(self.original, changed, args, kwargs)


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
        weight = self._owner[0]._parameters[self.name]
        assert weight is not None
        return self.oriented(weight)

    def oriented(self, weight: Tensor) -> Tensor:
        is_stack = weight.ndim == 3 and getattr(self._owner[0], "is_transposed", False)
        return weight.transpose(-1, -2) if is_stack else weight

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        *experts, out, in_ = self.base_weight.shape
        rank = config.rank_of(path)
        As = [new_A(rank, in_, config.init, generator) for _ in range(experts[0] if experts else 1)]
        A = torch.stack(As) if experts else As[0]
        adapter = Adapter(A, torch.zeros(*experts, out, rank), scaling=config.scaling_of(path))
        adapter.lora_A.requires_grad_(not config.lora_fa)
        self.attach(name, adapter)

    def changed(self) -> Tensor:
        """Return W + Σ w s B A as the owner keeps it, differentiably, in W's dtype."""
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
            weight = self.stored(merged_weight(self.base_weight, self.delta()))
            self._owner[0]._parameters[name] = nn.Parameter(weight.contiguous(), False)
        del wrapper.adapted[name]
        if not wrapper.adapted:
            model.set_submodule(owner, wrapper.original)

    def weight_in(self, plain: nn.Module, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        weight = plain.get_submodule(owner)._parameters[name]
        assert weight is not None
        return self.oriented(weight)
