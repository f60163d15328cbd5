"""Adapters that train beside each other over one base."""

from __future__ import annotations

from torch import nn

from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.use import acting, in_use


def attach_beside(
    model: nn.Module, config: LoRA, *, name: str, seed: int | None = None
) -> dict[str, nn.Parameter]:
    """Attach a fresh adapter as `attach` does, and return what of it trains, by names in the model.

    The adapters that train already go on to do so, and those that act already act alone: the new
    one does not act yet. The base is frozen.
    """
    attached = [module for module in model.modules() if isinstance(module, Adapter)]
    trained = [w for adapter in attached for w in adapter.parameters() if w.requires_grad]
    with acting(model, in_use(model)):
        attach(model, config, name=name, seed=seed)
        own = {path: weight for path, weight in model.named_parameters() if weight.requires_grad}
    for weight in trained:
        weight.requires_grad_(True)
    return own
