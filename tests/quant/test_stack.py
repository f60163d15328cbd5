"""Stacks of experts that are quantized one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from veneer.models.quantize import quantize
from veneer.quant.stack import QuantizedStack, expert_weight, quantized_modules


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_stands_for_the_parameter_that_it_replaces(bits, transposed):
    torch.manual_seed(0)
    weight = torch.randn(3, 64, 32)  # (experts, out, in)
    experts = [quantize(expert, bits, torch.float32) for expert in weight]
    stack = QuantizedStack(experts, transposed=transposed)
    kept = weight.transpose(1, 2) if transposed else weight
    assert (stack.shape, stack.ndim, stack.dtype) == (kept.shape, 3, torch.float32)
    assert stack.size(0) == len(stack) == 3
    whole = stack.dense()
    for e, expert in enumerate(experts):
        assert expert_weight(stack, e) is expert
        dense = expert_weight(whole, e, transposed=transposed)
        assert torch.equal(dense, expert.dequantize())
        assert torch.equal(stack[torch.tensor(e)], whole[e])
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(stack[ids], whole[ids])


def test_a_module_has_its_stack_under_the_parameters_name():
    module = nn.Module()
    weight = quantize(torch.randn(8, 64), 4, torch.float32)
    module.gate_up_proj = QuantizedStack([weight, weight])
    routed = []
    module.gate_up_proj.before_routed = routed.append
    module.gate_up_proj.note_routed([1, 0])
    x = torch.randn(2, 64)
    assert torch.equal(F.linear(x, module.gate_up_proj[1]), x @ weight.dequantize().T)
    assert list(quantized_modules(module)) == ["gate_up_proj"]
    assert routed == [[1, 0]]
    assert not module.state_dict()
