"""Weights that an adapter has instead of the base's own: biases, whole modules.

While the adapter acts, they are the parameters of the base's modules, so that kernels, autograd and
merging use them without knowing. `ActiveAdapters.replaced` keeps the base's own meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.adapter.active import active_adapters_of
from veneer.adapter.layers import lora_layers
from veneer.adapter.wrapper import Wrapper
from veneer.errors import AdapterError

Mix = list[tuple[nn.Parameter, float]]


def attach_modules_to_save(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep weights (by the path of the base's own) for the adapter called `name`, frozen."""
    if tensors:
        weights = {path: nn.Parameter(tensor, False) for path, tensor in tensors.items()}
        active_adapters_of(model).modules_to_save[name] = weights


def detach_modules_to_save(model: nn.Module, names: set[str]) -> None:
    """Forget the weights of adapters that no longer act."""
    for name in names:
        active_adapters_of(model).modules_to_save.pop(name, None)


def switch_modules_to_save(model: nn.Module) -> None:
    """Give the base's modules the weights of the adapters in use; all others get their own back.

    A mix has W + Σ w (T - W), with the trained T of weight w. Raises AdapterError, before anything
    has changed, for a mix with a low-rank adapter of the same layer, which changes the base's own
    weight.
    """
    active_adapters = active_adapters_of(model)
    mixes: dict[str, Mix] = {}
    for name, weight in active_adapters.weights.items():
        for path, trained in active_adapters.modules_to_save.get(name, {}).items():
            mixes.setdefault(path, []).append((trained, weight))
    if not mixes and not active_adapters.replaced:  # as with most adapters: no walk over the model
        return
    adapted = {path for path, layer in lora_layers(model) if layer.acts}
    if clashes := sorted(mixes.keys() & (adapted | {f"{path}.weight" for path in adapted})):
        raise AdapterError(f"Adapters cannot be mixed where one replaces {clashes[0]}.")
    for path in [*active_adapters.replaced]:
        if path not in mixes:
            _set_parameter(model, path, active_adapters.replaced.pop(path))
    for path, mix in mixes.items():
        owner, name = owner_of(model, path)
        current = owner._parameters[name]
        assert current is not None
        base = active_adapters.replaced.setdefault(path, current)
        _set_parameter(model, path, _mixed(base, mix))


@contextmanager
def base_weights_in_place(model: nn.Module) -> Iterator[None]:
    """Give the base's modules their own weights, and afterwards those of the adapters in use."""
    active_adapters = active_adapters_of(model)
    for path in [*active_adapters.replaced]:
        _set_parameter(model, path, active_adapters.replaced.pop(path))
    try:
        yield
    finally:
        switch_modules_to_save(model)


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the base's own module that has the parameter at `path`, and its name there.

    Raises AttributeError where the model has no such module.
    """
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    while isinstance(owner, Wrapper):
        owner = owner.original
    return owner, name


def _set_parameter(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owner, name = owner_of(model, path)
    current = owner._parameters[name]
    if current is not None and current.device != weight.device:  # the model has moved meanwhile
        weight.data = weight.data.to(current.device)
    owner._parameters[name] = weight


@torch.no_grad()
def _mixed(base: nn.Parameter, mix: Mix) -> nn.Parameter:
    first, weight = mix[0]
    if len(mix) == 1 and weight == 1.0:
        same = first.dtype == base.dtype
        return first if same else nn.Parameter(first.to(base.dtype), first.requires_grad)
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total = wide + sum(weight * (trained.to(wide) - wide) for trained, weight in mix)
    return nn.Parameter(total.to(base.dtype), False)
