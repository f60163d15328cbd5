"""What model code does with the weight of a layer that it does not call."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache

# `self.wo.weight.dtype`, `isinstance(self.wo.weight, torch.Tensor)`: questions of kind, not values.
LOOK = r"(?:\.(?:dtype|device|shape)\b|, torch\.Tensor\))"


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the class of the module that it belongs to, and its name there."""

    owner: type
    name: str

    @property
    def is_looked_at(self) -> bool:
        """Whether the owner's code asks for the weight's kind and no more.

        T5 asks for the dtype of `wo` at each pass, for which no weight need be made. Where the code
        says nothing, or is not there, somebody else may compute with it.
        """
        return _only_looks(self)


@cache
def _only_looks(place: Place) -> bool:
    try:
        source = inspect.getsource(place.owner)
    except (OSError, TypeError):  # made in a notebook, or by a program
        return False
    mentioned = re.findall(rf"\bself\.{re.escape(place.name)}\.weight\b({LOOK}?)", source)
    return bool(mentioned) and all(mentioned)
