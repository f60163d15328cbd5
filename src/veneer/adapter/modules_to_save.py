"""Weights that an adapter has in the place of the base's own while it acts: biases, whole modules.

They stand where the base's stood, as parameters of its modules, so that everything that looks there
finds them: kernels, autograd, merging. The base's own wait in `ActiveAdapters.base`.
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

Parts = list[tuple[nn.Parameter, float]]


def put_saved(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep weights (by the path of the base's own) for the adapter called `name`, frozen."""
    if tensors:
        kept = {path: nn.Parameter(tensor, False) for path, tensor in tensors.items()}
        active_adapters_of(model).saved[name] = kept


def place_saved(model: nn.Module) -> None:
    """Let the saved weights of the adapters in use stand in the base's places, the base's own
    everywhere else.

    Alone they are as trained; in a mix of weights w, W + Σ w (T - W). Raises AdapterError, before
    anything has changed, for a mix with another adapter of the same layer, whose change counts from
    the base's own weight.
    """
    active_adapters = active_adapters_of(model)
    wanted: dict[str, Parts] = {}
    for name, weight in active_adapters.weights.items():
        for path, tensor in active_adapters.saved.get(name, {}).items():
            wanted.setdefault(path, []).append((tensor, weight))
    if (
        not wanted and not active_adapters.base
    ):  # as of nearly every adapter: no walk over the model
        return
    acting = {path for path, layer in lora_layers(model) if layer.acts}
    if clashes := sorted(wanted.keys() & (acting | {f"{path}.weight" for path in acting})):
        raise AdapterError(f"Adapters cannot be mixed where one replaces {clashes[0]}.")
    for path in [*active_adapters.base]:
        if path not in wanted:
            _stand(model, path, active_adapters.base.pop(path))
    for path, parts in wanted.items():
        owner, leaf = home(model, path)
        here = owner._parameters[leaf]
        assert here is not None
        base = active_adapters.base.setdefault(path, here)
        _stand(model, path, _mixed(base, parts))


@contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Let the base's own weights stand in their places, and afterwards what is in use then."""
    active_adapters = active_adapters_of(model)
    for path in [*active_adapters.base]:
        _stand(model, path, active_adapters.base.pop(path))
    try:
        yield
    finally:
        place_saved(model)


def take_saved(model: nn.Module, names: set[str]) -> None:
    """Forget the saved weights of adapters that no longer act."""
    for name in names:
        active_adapters_of(model).saved.pop(name, None)


def home(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the base's own module that has the parameter at `path`, and its name there.

    Raises AttributeError where the model has no such module.
    """
    place, _, leaf = path.rpartition(".")
    owner = model.get_submodule(place)
    while isinstance(owner, Wrapper):
        owner = owner.original
    return owner, leaf


def _stand(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owner, leaf = home(model, path)
    here = owner._parameters[leaf]
    if here is not None and here.device != weight.device:  # the model has moved meanwhile
        weight.data = weight.data.to(here.device)
    owner._parameters[leaf] = weight


@torch.no_grad()
def _mixed(base: nn.Parameter, parts: Parts) -> nn.Parameter:
    alone, weight = parts[0]
    if len(parts) == 1 and weight == 1.0:
        same = alone.dtype == base.dtype
        return alone if same else nn.Parameter(alone.to(base.dtype), alone.requires_grad)
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total = wide + sum(weight * (part.to(wide) - wide) for part, weight in parts)
    return nn.Parameter(total.to(base.dtype), False)
