"""A wrapper around a frozen module, which from outside looks like the module itself.

Hooks keep the base's own names in state dicts, so that whatever writes and reads them
(transformers' Trainer and `save_pretrained`, first of all) needs to know nothing of wrappers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

ORIGINAL = "original"
INNER = f"{ORIGINAL}."


class Wrapper(nn.Module):
    """A frozen `original`, whose weights keep their names of the base in state dicts."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.training = original.training
        self.register_state_dict_post_hook(_without_inner)
        self.register_load_state_dict_pre_hook(_with_inner)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return which child has what state dicts name as this module's own: torch's distributed
        checkpoints ask for it under this name."""
        inner = self.original
        names = {*inner._modules, *inner._parameters, *inner._buffers}
        if isinstance(inner, Wrapper):
            names |= {*inner._fqn_modifiers()}
        own = {*self._modules, *self._parameters, *self._buffers}
        return dict.fromkeys(names - own, ORIGINAL)

    def __getattr__(self, name: str) -> Any:
        # Its own modules come first: they are read many times a step.
        if (module := self.__dict__["_modules"].get(name)) is not None:
            return module
        # Model code reads attributes of the layer that it knows (weight, in_features, nf).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


def unwrapped(module: Any) -> Any:
    """Return what a module wraps, or the module itself."""
    while isinstance(module, Wrapper):
        module = module.original
    return module


def is_intercepted(module: object) -> bool:
    """Return whether a call of a module runs hooks, or a forward that was set over its class's."""
    return isinstance(module, nn.Module) and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _without_inner(wrapper: nn.Module, state: dict[str, Any], prefix: str, _meta: object) -> None:
    """Rename `original.weight` to `weight` in a state dict that is being made."""
    inner = prefix + INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _with_inner(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_report: object) -> None:
    """Rename `weight` to `original.weight` in a state dict that is being loaded, unless the wrapper
    itself has something of that name."""
    names = {*wrapper._modules, *wrapper._parameters, *wrapper._buffers}
    for key in [key for key in state if key.startswith(prefix)]:
        inner = key.removeprefix(prefix)
        if inner.partition(".")[0] not in names:
            state[prefix + INNER + inner] = state.pop(key)
