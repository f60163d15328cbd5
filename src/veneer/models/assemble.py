"""Put a model together from a skeleton and its weights, dense or quantized."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.errors import ModelError, listed
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedLinear, QuantizedWeight

AnyWeight = Tensor | QuantizedWeight | QuantizedStack


def assemble(
    skeleton: PreTrainedModel,
    weights: Iterable[tuple[str, AnyWeight]],
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> PreTrainedModel:
    """Give a skeleton on the meta device its weights, and return it.

    Each weight goes to its device before the next one comes, so that the processor's memory never
    holds them all. Tensors of `dtype` are not copied, others are cast. Where blocks are sharded or
    offloaded, each is so as soon as the next block's weights come. Raises ModelError for missing
    weights and wrong shapes.
    """
    buffers = to.buffers(skeleton)
    device = to.device if to.offload == "none" else None
    for name, weight in weights:
        path, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        transposed = isinstance(weight, QuantizedWeight) and isinstance(owner, Conv1D)
        shape, expected = tuple(weight.shape), tuple(getattr(owner, leaf).shape)
        if shape != (expected[::-1] if transposed else expected):
            raise ModelError(f"{name} is {shape}, but this model's is {expected}.")
        if device is not None:
            weight = weight.to(device)
        if isinstance(weight, QuantizedStack):
            del owner._parameters[leaf]
            owner.add_module(leaf, weight)
            _loop_over_experts(owner)
        elif isinstance(owner, nn.Embedding) and isinstance(weight, QuantizedWeight):
            skeleton.set_submodule(path, QuantizedEmbedding(weight, owner))
        elif isinstance(weight, QuantizedWeight):
            layer = QuantizedLinear(weight, owner, transposed=transposed)
            skeleton.set_submodule(path, layer)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = weight
        else:
            cast = weight.to(dtype) if weight.is_floating_point() else weight
            owner._parameters[leaf] = parameter = nn.Parameter(cast, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if buffers is not None:
            buffers.note(name)
    skeleton.tie_weights()
    missing = [name for name, parameter in skeleton.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"The model lacks {len(missing)} weights: {listed(missing)}.")
    _make_buffers(skeleton, device)
    if buffers is not None:
        buffers.finish()
    return skeleton.eval()


def _loop_over_experts(module: nn.Module) -> None:
    """Have a module use its own loop, which takes one expert at a time from the stack.

    transformers' other functions take the whole stack at once, dense.
    """
    config = getattr(module, "config", None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # type: ignore[union-attr]


def _make_buffers(model: PreTrainedModel, device: torch.device | None) -> None:
    """Compute buffers that no file holds, such as the frequencies of rotary embeddings."""
    for module in model.modules():
        absent = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        if absent:
            module._buffers |= {
                name: torch.empty_like(b, device="cpu") for name, b in absent.items()
            }
            with torch.no_grad():
                model._init_weights(module)  # which computes the buffers of each architecture
            if device is not None:
                module._buffers |= {n: getattr(module, n).to(device) for n in absent}
