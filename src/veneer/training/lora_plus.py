"""LoRA+: the second factor learns faster than the first (Hayou et al. 2024, section 5)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers

EMBEDDING_LR = 1e-6  # of adapters over embeddings, as the authors' code has it


def lr_ratios(model: nn.Module, *, ratio: float, lr: float) -> Mapping[str, float]:
    """Return the learning rates of a model's trained parameters as multiples of `lr`, by name.

    B and whatever has one dimension: `ratio`. Adapters over embeddings: 1e-6, whatever `lr` is.
    Everything else: 1. These are the groups of the authors' code.
    """
    embeddings = {
        id(weight)
        for _, layer in lora_layers(model)
        if isinstance(layer, LoRAEmbedding)
        for weight in layer.adapters.parameters()
    }

    def ratio_of(name: str, weight: nn.Parameter) -> float:
        if id(weight) in embeddings:
            return EMBEDDING_LR / lr
        return ratio if name.endswith(".lora_B") or weight.ndim == 1 else 1.0

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: ratio_of(name, weight) for name, weight in trained.items()}
