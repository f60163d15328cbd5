"""Law 3 for every architecture that people tune: the gradients of A and B, by the way that a run
chooses, are those of plain autograd over a model whose weights are W + s B A."""

from __future__ import annotations

import pytest
import torch

from support.closeness import assert_gradients_no_further, assert_no_further
from support.every_architecture import OFTEN
from support.plain import Float64, plain_pair
from support.small_kinds import LATENT, LAYERS, MIXTURES, ROWS, SmallKind, gradients
from veneer.fused.forward import choose_forward

EVERY = [
    *(*OFTEN, *LATENT[:1], *MIXTURES),
    *(pytest.param(name, marks=pytest.mark.slow) for name in LATENT[1:]),
]


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "dora, 4 bits"])
@pytest.mark.thinned
def test_gradients_of_every_architecture(architecture, bits):
    # DoRA is for layers, and no stacks of experts.
    targets = "attention" if bits and architecture in (*LATENT, *MIXTURES) else "all"
    lora = {"targets": targets, "dora": bits is not None}
    kind = SmallKind("small", architecture, bits=bits, lora=lora)
    model = kind.shaken()
    plain, exact = plain_pair(kind, model)
    expected = exact.gradients(exact.loss(ROWS))
    assert_gradients_no_further(gradients(model), plain.gradients(plain.loss(ROWS)), expected)


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.thinned(one_in=3)
def test_gradients_in_float64(architecture):
    kind = SmallKind("small", architecture, lora={"targets": "all"})
    model = kind.shaken()
    _, exact = plain_pair(kind, model)
    expected = exact.gradients(exact.loss(ROWS))
    with Float64():
        ours = gradients(model.double())
    for name, gradient in expected.items():
        assert_no_further(ours[name], gradient, gradient, name)


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.thinned(one_in=3, first=1)
def test_layers_are_fused_in_16_bits(architecture):
    kind = SmallKind("small", architecture, lora={"targets": "all"})
    chosen, notices = choose_forward(kind.fresh(torch.bfloat16), ROWS)
    assert len(chosen.layers) == LAYERS
    assert notices == []
