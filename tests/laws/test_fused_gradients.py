"""Law 3 for every architecture that people tune: the gradients of A and B, by the way that a run
chooses, are those of plain autograd over a model whose weights are W + s B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from support.closeness import assert_gradients_no_further, assert_no_further
from support.every_architecture import OFTEN, small, small_quantized
from support.kinds import Kind
from support.plain import Float64, plain_pair
from support.random_adapters import examples
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward

# Longer than the windows of attention, and shorter.
ROWS = examples([7, 19, 12, 5])
LAYERS = 2
MIXTURES = ("qwen3_moe", "gpt_oss")


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


@pytest.mark.parametrize("architecture", [*OFTEN, *MIXTURES])
@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "dora, 4 bits"])
def test_gradients_of_every_architecture(architecture, bits):
    # DoRA is for layers, and no stacks of experts.
    targets = "attention" if bits and architecture in MIXTURES else "all"
    lora = {"targets": targets, "dora": bits is not None}
    kind = SmallKind("small", architecture, bits=bits, lora=lora)
    model = kind.shaken()
    plain, exact = plain_pair(kind, model)
    expected = exact.gradients(exact.loss(ROWS))
    assert_gradients_no_further(gradients(model), plain.gradients(plain.loss(ROWS)), expected)


@pytest.mark.parametrize("architecture", [*OFTEN, *MIXTURES])
def test_gradients_in_float64(architecture):
    kind = SmallKind("small", architecture, lora={"targets": "all"})
    model = kind.shaken()
    _, exact = plain_pair(kind, model)
    expected = exact.gradients(exact.loss(ROWS))
    with Float64():
        ours = gradients(model.double())
    for name, gradient in expected.items():
        assert_no_further(ours[name], gradient, gradient, name)


@pytest.mark.parametrize("architecture", [*OFTEN, *MIXTURES])
def test_layers_are_fused_in_16_bits(architecture):
    kind = SmallKind("small", architecture, lora={"targets": "all"})
    chosen, notices = choose_forward(kind.fresh(torch.bfloat16), ROWS)
    assert len(chosen.layers) == LAYERS
    assert notices == []
