"""Routed experts by the operations of a module's own loop over its experts, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank.expert_gates import OwnGate
from veneer.lowrank.expert_stacks import Experts, Stack, StackUpdate
from veneer.lowrank.routing import Routing
from veneer.quant.weight import product


@torch.no_grad()
def looped_experts(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Return Σ_j w_tj · expert_tj(x_t), (tokens, out), of x (tokens, in), index and weights
    (tokens, k), as `routed_experts` does.

    A module with quantized stacks takes one expert after the other and adds up their outputs in
    that order. Products, sums and activations round by how many numbers they are given at once and
    by their places, so only the same order, of an expert's rows too, gives the same bits.
    """
    routing = Routing(index, experts.count)
    experts.note_routed(routing)
    k, w = index.shape[1], weights.reshape(-1, 1)  # of each row, (tokens · k, 1)
    total, gate = torch.zeros_like(x), experts.gate
    for expert, own in routing.segments:
        rows = routing.order[own]
        rows = rows[(rows % k).argsort(stable=True)]  # all tokens' first choices before the second
        token = rows // k
        up = _projected(x[token], experts.up, expert)
        inner = gate.function(up) if isinstance(gate, OwnGate) else gate.forward(up)
        y = _projected(inner, experts.down, expert)
        if experts.post_norm is not None:
            y = experts.post_norm(y)
        total.index_add_(0, token, (y * w[rows]).to(total.dtype))
    return total


def _projected(x: Tensor, stack: Stack, expert: int) -> Tensor:
    """Return W_e x + B_e A_e x + b_e of the rows of one expert."""
    y = x.new_empty(len(x), stack.out_features)
    product(x, stack.weight_of(expert, x.dtype), y)
    if isinstance(update := stack.update, StackUpdate):
        y.addmm_(x @ update.A_of(expert).T, update.Bt[expert])
    if stack.bias is not None:
        y += stack.bias[expert]
    return y
