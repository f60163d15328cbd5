"""Whether model code computes with a layer's weight, or only asks for its dtype and the like."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache

# `self.wo.weight.dtype`, `isinstance(self.wo.weight, torch.Tensor)`: they read no values.
LOOK = r"(?:\.(?:dtype|device|shape)\b|, torch\.Tensor\))"


@dataclass(frozen=True)
class Place:
    """Where a layer is: the class of the module that owns it, and its name there."""

    owner: type
    name: str

    @property
    def is_looked_at(self) -> bool:
        """Whether the owner's code asks for the weight's dtype, device or shape, and no more.

        T5 asks for the dtype of `wo` in each pass; no adapted weight need be computed for that.
        False where the code does not name the weight, or cannot be read.
        """
        mentioned, _ = _uses(self)
        return bool(mentioned) and all(mentioned)

    @property
    def is_never_called(self) -> bool:
        """Whether the owner's code computes with the weight and never calls the layer, as Mamba
        does with `dt_proj`. False where the code cannot be read."""
        mentioned, is_called = _uses(self)
        return not all(mentioned) and not is_called


@cache
def _uses(place: Place) -> tuple[tuple[str, ...], bool]:
    """Return what the owner's code only looks at where it names the weight, "" where it computes
    with it; and whether it calls the layer."""
    try:
        source = inspect.getsource(place.owner)
    except (OSError, TypeError):  # made in a notebook, or by a program
        return (), False
    layer = rf"\bself\.{re.escape(place.name)}"
    mentioned = re.findall(rf"{layer}\.weight\b({LOOK}?)", source)
    return tuple(mentioned), re.search(rf"{layer}\(", source) is not None
