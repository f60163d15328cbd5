"""The experts modules of mixtures that `lowrank/experts.py` computes: recognised by transformers'
contract (transformers/integrations/moe.py), and proven by numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.adapter.wrapper import is_intercepted
from veneer.kernels.activation import activation_of
from veneer.kernels.arena import Arena
from veneer.kernels.wide import wide
from veneer.lowrank.expert_gates import Gate, KnownGate, OwnGate
from veneer.lowrank.expert_loop import looped_experts
from veneer.lowrank.expert_stacks import (
    Experts,
    SegmentUpdates,
    Stack,
    StackUpdate,
    TokenUpdates,
)
from veneer.lowrank.experts import routed_experts as computed
from veneer.models.block_buffers import whole
from veneer.quant.stack import QuantizedStack

CONTRACT = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
# How far our numbers may be from the module's own, relatively: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
PROBE_TOKENS = 6
# Gates bound what they read to some ±7 or ±10; the points at which they are compared lie beyond.
GATE_SPREAD = 8.0

# The module's experts, or why it computes them itself.
_PROVEN: WeakKeyDictionary[nn.Module, RoutedExperts | str] = WeakKeyDictionary()


@dataclass(frozen=True)
class RoutedExperts:
    """What of an experts module is its own: the names of its stacks, its activation, its norm, and
    its gate where that is known."""

    up: str
    down: str
    gate: KnownGate | None
    act_fn: nn.Module | None
    post_norm: nn.Module | None

    def experts(
        self,
        module: Any,
        updates: Mapping[str, StackUpdate | SegmentUpdates | TokenUpdates | None],
        *,
        exact: bool = False,
    ) -> Experts:
        """Return the module's experts as they are now. exact: whether their output without updates
        is to be the module's own to the bit."""

        def stack(name: str) -> Stack:
            bias = getattr(module, f"{name}_bias") if module.has_bias else None
            transposed = bool(module.is_transposed)
            return Stack(getattr(module, name), transposed, bias, updates.get(name))

        gate: Gate | None = self.gate
        if exact or gate is None:
            gate = OwnGate(_own_gate(module), self.gate)
        return Experts(stack(self.up), stack(self.down), gate, self.post_norm, exact)

    def applies(self, module: nn.Module) -> bool:
        """Return whether nobody waits for a call of its activation, and nothing but adapters
        trains."""
        return (
            getattr(module, "act_fn", None) is self.act_fn
            and not (self.act_fn is not None and is_intercepted(self.act_fn))
            and not any(weight.requires_grad for weight in module.parameters())
        )


def routed_experts(
    module: nn.Module,
    updates: Mapping[str, StackUpdate | SegmentUpdates | TokenUpdates | None],
    inputs: Sequence[Any],
    *,
    exact: bool = False,
    arena: Arena | None = None,
    recompute_projections: bool = False,
) -> Tensor | None:
    """Return what an experts module makes of its inputs, with updates of its stacks by their names;
    None where its own forward is needed.

    inputs: hidden states (tokens, dim), the experts of each token and their weights (tokens, k).
    exact: whether the output without updates is to be the module's own to the bit.
    """
    recognised = recognised_experts(module)
    if isinstance(recognised, str) or not recognised.applies(module) or len(inputs) != 3:
        return None
    if not updates.keys() <= {recognised.up, recognised.down}:
        return None
    x, index, weights = inputs
    if x.ndim != 2 or index.ndim != 2 or index.shape != weights.shape:
        return None
    dtype, x = x.dtype, x.to(compute_dtype(x))
    experts = recognised.experts(module, updates, exact=exact)
    with torch.autocast(x.device.type, enabled=False):
        if exact and _loops(experts, x, weights):
            return looped_experts(x, index, weights, experts).to(dtype)
        y = computed(
            x,
            index,
            weights,
            experts,
            arena=arena,
            recompute_projections=recompute_projections,
        )
    return y.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which experts multiply x: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _loops(experts: Experts, x: Tensor, weights: Tensor) -> bool:
    """Return whether the module's own output is its loop's over quantized stacks, and nothing needs
    a gradient."""
    stacks = (experts.up, experts.down)
    trains = any(w.requires_grad for w in (x, weights, *experts.trained()))
    return (
        all(isinstance(stack.weight, QuantizedStack) for stack in stacks)
        and not any(isinstance(stack.update, TokenUpdates) for stack in stacks)
        and not (trains and torch.is_grad_enabled())
    )


def recognised_experts(module: nn.Module) -> RoutedExperts | str:
    """Return how an experts module is computed by ours, or why it is not. Asked once, and then
    remembered."""
    known = _PROVEN.get(module)
    if known is None:
        known = _PROVEN[module] = _recognised(module)
    return known


def why_not_by_rows(module: nn.Module, name: str) -> str | None:
    """Return why rows of a batch cannot each have an adapter of this parameter of their own."""
    recognised = recognised_experts(module)
    if isinstance(recognised, str):
        return recognised
    return None if name in (recognised.up, recognised.down) else "it is no stack of experts"


def has_experts(module: nn.Module) -> bool:
    """Return whether a module holds stacks of experts by transformers' contract."""
    return all(hasattr(module, name) for name in CONTRACT)


def _recognised(module: nn.Module) -> RoutedExperts | str:
    if not has_experts(module):
        return "it does not follow transformers' contract for experts"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    up, down = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    for name in (up, down):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor | QuantizedStack) or weight.ndim != 3:
            return f"it has no stack of experts {name}"
    act_fn: Any = getattr(module, "act_fn", None)
    norm: Any = module.post_expert_norm if module.has_post_expert_norm else None
    own = inspect.unwrap(type(module).forward)
    try:
        device = getattr(module, up).device.type
        with whole(module), torch.no_grad(), torch.autocast(device, enabled=False):
            recognised = RoutedExperts(up, down, _known_gate(module), act_fn, norm)
            return _why_not(module, recognised, own) or recognised
    except Exception as error:  # whatever a foreign architecture raises
        return f"{type(error).__name__}: {error}"


def _own_gate(module: Any) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return function


def _known_gate(module: Any) -> KnownGate | None:
    """Return the known gate that has the numbers of a module's own, or None."""
    act_fn = getattr(module, "act_fn", None)
    activation = activation_of(act_fn) if isinstance(act_fn, nn.Module) else None
    if activation is None:
        return None
    known = KnownGate(activation, module.has_gate)
    points = GATE_SPREAD * _noise((64, 16), torch.float32, torch.device("cpu"))
    own, ours = _own_gate(module)(points), known.forward(points)
    same = own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-4, atol=1e-5)
    return known if same else None


def _why_not(module: Any, recognised: RoutedExperts, own: Any) -> str | None:
    """Return why a module's own forward is something else than ours, or None."""
    experts = recognised.experts(module, {})
    count, weight = experts.count, experts.up.weight
    k = min(2, count)
    x = _noise((PROBE_TOKENS, experts.up.in_features), weight.dtype, weight.device)
    # The first experts and the last; of a mapped base only these are read.
    chosen = torch.tensor([0, count // 2, count - 1])
    index = torch.stack([chosen.roll(t)[:k] for t in range(PROBE_TOKENS)]).to(weight.device)
    if count < 3:
        index = torch.arange(k, device=weight.device).repeat(PROBE_TOKENS, 1)
    weights = _noise((PROBE_TOKENS, k), weight.dtype, weight.device).abs() + 0.1
    expected = own(module, x, index, weights)
    y = computed(x, index, weights, experts)
    if y.shape != expected.shape or y.dtype != expected.dtype:
        return "its output is of another shape or dtype"
    distance = (wide(y) - wide(expected)).norm(dim=-1)
    allowed = TOLERANCE[y.dtype] * wide(expected).norm(dim=-1)
    if bool((distance <= allowed).all()):
        return None
    return "its numbers are others than those of its experts by transformers' contract"


def _noise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers N(0, 1), the same each time, without touching torch's random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)
