"""Models whose tokens are dealt over processes: what is refused, and what sees all positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.errors import ConfigError
from veneer.fused.head import described
from veneer.fused.patches import Patch
from veneer.kernels.dealt_packing import DealtPacking
from veneer.processes.context import ContextGroup


def refuse_undealt(
    model: PreTrainedModel,
    group: ContextGroup,
    *,
    why_not_packed: str | None,
    loss: Callable[[], Tensor],
    own: float,
    tolerance: float,
) -> None:
    """Raise ConfigError, in every process, where this model's tokens cannot be dealt.

    loss: this process's share of that of a few dealt rows, whose sum must be the model's `own`.
    Tokens that meet elsewhere than in attention, as in states and convolutions, show there.
    """
    why = None
    if virtual_tokens_of(model) is not None:
        why = "virtual tokens come before each row, and no process has whole rows"
    elif why_not_packed:
        why = f"its rows cannot be packed: {why_not_packed}"
    else:
        share = 0.0
        try:
            share = float(loss())
        except Exception as error:  # whatever a foreign architecture raises
            why = described(error)
        if group.any(why is not None):
            why = why or "another process raised an error"
        elif not abs((total := group.sum(share)) - own) <= tolerance * abs(own):
            why = f"their loss of {total:.6g} differs from the model's own {own:.6g}"
    if why:
        raise ConfigError(
            f"The tokens of a batch cannot be dealt over {group.size} processes (context parallel) "
            f"for this model and adapter, since {why}. Give each process rows of its own: leave "
            "--context-parallel out."
        )


def length_dependent_rotaries(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that choose their frequencies by the highest position of a pass."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds):
            yield module


class RotaryOfAll(Patch):
    """A rotary embedding that sees the highest position of the whole batch in every process."""

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        packing = self.installation.packing
        if not self.installation.is_running or not isinstance(packing, DealtPacking):
            return self.original(x, position_ids, *args, **options)
        highest = position_ids.new_full((1, 1), packing.highest)
        more = torch.cat([position_ids, highest], 1)  # (1, tokens + 1)
        cos, sin = self.original(x, more, *args, **options)
        return cos[:, :-1], sin[:, :-1]
