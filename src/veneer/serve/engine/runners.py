"""Which way a base is computed: the fastest that is proven to be right."""

from __future__ import annotations

from transformers import PreTrainedModel

from veneer.serve.engine.compiled import Compiled, Unsuited
from veneer.serve.engine.general import General
from veneer.serve.engine.runner import Runner


def runner_for(model: PreTrainedModel, slots: int, context: int) -> tuple[Runner, tuple[str, ...]]:
    """Return a runner for a base, and what a person should know of it."""
    try:
        return Compiled(model, slots, context), ()
    except Unsuited as why:
        notice = f"Each step goes through the model's own forward, which is slower, for {why}."
        return General(model, slots), (notice,)
