"""Adapters over the small model of each architecture, and their gradients by a run's own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.every_architecture import small, small_quantized
from support.kinds import Kind
from support.random_adapters import examples
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward

# Longer than the windows of attention, and shorter.
ROWS = examples([7, 19, 12, 5])
LAYERS = 2
MIXTURES = ("qwen3_moe", "gpt_oss")
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3", "sarvam_mla")  # each turns in its own way


@dataclass(frozen=True)
class SmallKind(Kind):
    """A kind of adapter over the small model of an architecture."""

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        if self.bits:
            return small_quantized(self.architecture, self.bits, dtype=dtype)  # type: ignore[arg-type]
        return small(self.architecture, dtype=dtype)


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of what trains, by the way that a run chooses."""
    chosen, _ = choose_forward(model, ROWS)
    assert len(chosen.layers) == LAYERS  # or the law would be tried on nothing
    loss = chosen(model, pack(ROWS, range(len(ROWS))))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))
