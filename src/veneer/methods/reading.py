"""What model code does with the weight of a layer that it does not call."""

from __future__ import annotations

import inspect
import re
from functools import cache

from torch import nn

# `self.wo.weight.dtype`, `isinstance(self.wo.weight, torch.Tensor)`: questions of kind, not values.
LOOK = r"(?:\.(?:dtype|device|shape)\b|, torch\.Tensor\))"


def only_looks_at(owner: nn.Module, name: str) -> bool:
    """Return whether the module that a layer belongs to asks for its weight's kind and no more.

    T5 asks for the dtype of `wo` at each pass, for which no weight need be made. Where the code
    says nothing, or is not there, somebody else may compute with it.
    """
    source = _source(type(owner))  # type: ignore[arg-type]
    mentioned = re.findall(rf"\bself\.{re.escape(name)}\.weight\b({LOOK}?)", source)
    return bool(mentioned) and all(mentioned)


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made in a notebook, or by a program
        return ""
