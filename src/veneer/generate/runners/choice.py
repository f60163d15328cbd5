"""Which runner computes a base."""

from __future__ import annotations

from transformers import PreTrainedModel

from veneer.generate.runners.compiled import CompiledRunner
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.layer_table import Unsuited
from veneer.generate.runners.runner import Runner
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.slots import NotInSlots


def runner_for(model: PreTrainedModel, slots: int, context: int) -> tuple[Runner, tuple[str, ...]]:
    """Return the fastest runner that is proven right for a base, and notices for a person."""
    try:
        if model.device.type != "cpu":
            return SlotRunner(model, slots, context), ()
        return CompiledRunner(model, slots, context), ()
    except (Unsuited, NotInSlots) as why:
        notice = f"Each step goes through the model's own forward, which is slower, for {why}."
    return GeneralRunner(model, slots), (notice,)
