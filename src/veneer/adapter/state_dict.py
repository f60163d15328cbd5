"""How the weights of a wrapped layer are called outside of it: as the base calls them.

With these hooks on a wrapper, the state dict of an adapted model holds the base's weights under the
base's own names, and beside them what lies over it, so that whatever writes and reads state dicts
(transformers' Trainer and `save_pretrained`, first of all) needs to know nothing of wrappers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

INNER = "original."


def as_the_base_does(
    wrapper: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Call `original.weight` just `weight` in a state dict that is being made."""
    inner = prefix + INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def as_wrapped(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_report: object) -> None:
    """Call what is none of the wrapper's own `original.…` in a state dict that is being loaded."""
    own = {*wrapper._modules, *wrapper._parameters, *wrapper._buffers}
    for key in [key for key in state if key.startswith(prefix)]:
        rest = key.removeprefix(prefix)
        if rest.partition(".")[0] not in own:
            state[prefix + INNER + rest] = state.pop(key)
