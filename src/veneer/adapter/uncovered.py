"""What `all` and `mlp` cannot reach: weights that stand in the blocks and are no layers."""

from __future__ import annotations

import re

from torch import nn

from veneer.adapter.config import LoRA
from veneer.adapter.targets import adaptable_layers, blocks_of, resolve
from veneer.models.fingerprint import base_parameters
from veneer.quant.weight import quantized_layers

WHOLE = {"all", "mlp"}  # targets that promise every linear layer of a kind


def uncovered(model: nn.Module, config: LoRA) -> str | None:
    """Return which matrices of the adapted blocks stay as they are though a person who asks for
    `all` or `mlp` may think otherwise, or None: experts that are one parameter, routers, Mamba's
    convolutions. Raises TargetError for targets that match nothing.
    """
    if not WHOLE.intersection(config.targets):
        return None
    blocks = blocks_of(model)
    known = {layer.path for layer in adaptable_layers(model)}
    adapted = {layer.block for layer in resolve(model, config)}
    total = sum(
        layer.quantized_weight.shape.numel()
        for path, layer in quantized_layers(model).items()
        if path in blocks and blocks[path] in adapted
    )
    missing = 0
    names: dict[str, None] = {}  # in the model's order
    for path, weight in base_parameters(model).items():
        owner = path.rpartition(".")[0]
        if blocks.get(owner) not in adapted or owner not in blocks:
            continue
        total += weight.numel()
        if weight.ndim > 1 and owner not in known:
            missing += weight.numel()
            names[re.sub(r"^.*?\.\d+\.", "", path)] = None
    if not missing:
        return None
    return (
        f"Adapters lie over linear layers and embeddings; of the adapted blocks' weights "
        f"{missing / total:.1%} are neither and stay as they are: {', '.join(names)}."
    )
