"""What counts as a linear layer: by what it computes, and not by its class."""

import pytest
import torch
from torch import nn

from support.every_architecture import small, small_quantized
from veneer.models.description import describe, multiplies
from veneer.quant.weight import quantized_layers


class Multiplying(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Choosing(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_or_does_more(bias, device):
    for kind, expected in ((nn.Linear, 1), (Multiplying, 1), (Scaling, 0), (Choosing, 0)):
        assert multiplies(kind(8, 4, bias=bias, device=device)) == expected


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama4_text", "router"), ("phimoe", "router"), ("deepseek_v4", "o_a_proj")],
)
def test_routers_and_products_in_groups_are_no_linear_layers(model_type, name):
    layers = [x for x in describe(small(model_type)).layers if x.path.endswith(f"{name}.weight")]
    assert layers
    assert not any(layer.is_linear for layer in layers)
    base = small_quantized(model_type, 4, dtype=torch.float32)
    assert not any(path.endswith(name) for path in quantized_layers(base))


def test_layers_of_falcon_are_linear():
    layers = describe(small("falcon")).layers
    assert sum(layer.is_linear for layer in layers) == 2 * 4 + 1  # with the head
