"""What a person should know of functions that take a slower way over a model on this machine."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.parameters import LoRAParameters
from veneer.kernels import choice, native
from veneer.quant.stack import QuantizedStack


def slower_ways(model: PreTrainedModel, routed: Mapping[nn.Module, str | None]) -> list[str]:
    """Return a notice for each slower way. routed: the experts of a mixture, and why they are not
    computed as one function, None where they are."""
    notices = _of_experts(routed)
    device = choice.device_of(model.device)
    quantized = any(isinstance(module, QuantizedStack) for module in model.modules())
    if routed and (why := choice.slower_experts_on(device, model.dtype, quantized=quantized)):
        notices.append(f"{why}.")
    if model.device.type == "cpu" and (why := native.why_compiled()):
        notices.append(f"Native parts are compiled on this machine, since {why}.")
    if model.device.type == "cpu" and (why := native.load()[1]):
        notices.append(f"Norms, activations and attention take a slower way: {why}.")
    if why := choice.slower_on(device):
        notices.append(f"Norms, activations and attention take a slower way: {why}.")
    return notices


def _of_experts(routed: Mapping[nn.Module, str | None]) -> list[str]:
    """Return a notice where adapters of experts act by a weight made anew."""
    reasons = [why for module, why in routed.items() if why and isinstance(module, LoRAParameters)]
    if not reasons:
        return []
    return [
        f"The adapted experts of {len(reasons)} layers are computed with W + s B A, a weight made "
        f"anew in each pass, since {', '.join(sorted(set(reasons)))}."
    ]
