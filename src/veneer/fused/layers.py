"""Decoder layers that can be computed as the two functions of `fused/block.py`.

A layer is recognized by the names of its submodules (those of LLaMA, Mistral, Qwen2 and their like)
and then proven by numbers: its own forward, with whatever scaling, window or multiplier it has,
must give what the two functions give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.adapter.linear import LoRALinear
from veneer.fused.block import FeedForward, SelfAttention
from veneer.kernels.arena import Arena
from veneer.kernels.attention import NAME, Attention, Packing, packed_attention
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary
from veneer.lowrank.projection import Projection
from veneer.quant.weight import QuantizedLinear

SUBMODULES = {  # by path, the names of the submodules there
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# How far a shortcut may be from the model's own way, relatively: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Angles = tuple[Tensor, Tensor]  # cos and sin, (1, tokens, head_dim)
Options = dict[str, Any]  # keyword arguments of a layer, or of its attention


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer of this model that may be computed as two functions.

    scale: what attention's scores are multiplied with; window: the keys that a query sees, or None
    for all of them.
    """

    layer: nn.Module
    scale: float
    window: int | None

    def forward(
        self,
        hidden_states: Tensor,  # (1, tokens, dim)
        *,
        position_embeddings: Angles,
        packing: Packing,
        arena: Arena,
        recompute_projections: bool = False,
    ) -> Tensor | None:
        """Return the layer's output, or None where its own forward is needed: for dropout, trained
        norms or biases, a prefix, or mixed dtypes."""
        dtype = hidden_states.dtype
        projections = self._projections()
        autocast = torch.is_autocast_enabled(hidden_states.device.type)
        if projections is None or packing.prefix is not None or autocast:
            return None
        norms = self.norms()
        if {x.weight.dtype for x in projections} | {w.dtype for w in _weights(norms)} != {dtype}:
            return None
        q, k, v, o, gate, up, down = projections
        # LLaMA holds each angle twice, once for each half of a head.
        cos, sin = (x[0].chunk(2, -1)[0].to(dtype).contiguous() for x in position_embeddings)
        first = SelfAttention(
            norm=norms[0],
            inputs=(q, k, v),
            output=o,
            attention=Attention(packing, self.scale, self.window),
            rotary=Rotary(cos, sin),
            arena=arena,
            recompute_projections=recompute_projections,
        )
        x, summands = first(hidden_states[0])
        second = FeedForward(
            norm=norms[1],
            inputs=(gate, up),
            output=down,
            arena=arena,
            recompute_projections=recompute_projections,
            summands=summands,
        )
        return second(x).unsqueeze(0)

    def linears(self) -> list[nn.Module]:
        """Return q, k, v, o, gate, up and down as they are now."""
        layer: Any = self.layer
        attend, mlp = layer.self_attn, layer.mlp
        return [
            *(attend.q_proj, attend.k_proj, attend.v_proj, attend.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        ]

    def norms(self) -> tuple[Norm, Norm]:
        """Return the norms before attention and before the feed-forward part."""
        layer: Any = self.layer
        return norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)

    def applies(self) -> bool:
        """Return whether the layer, with its adapters as they act now, can be computed so."""
        return self._projections() is not None

    def _projections(self) -> list[Projection] | None:
        if any(weight.requires_grad for weight in _weights(self.norms())):
            return None
        linears = self.linears()
        projections = [p for layer in linears if (p := _projection(layer)) is not None]
        return projections if len(projections) == len(linears) else None


def fused_layers(model: PreTrainedModel, tokens: Tensor) -> tuple[FusedLayer, ...]:
    """Return the layers of `model` that the two functions provably compute.

    tokens (1, tokens): a short text for the proof. The model is in evaluation mode, and computes
    packed rows.
    """
    likely = [layer for layer in model.modules() if looks_fusable(layer)]
    if not likely:
        return ()
    packing, arena = Packing([tokens.shape[1]], model.device), Arena()
    decoder: Any = model.get_decoder()
    proven: list[FusedLayer] = []

    # In the pass itself, while the layer's weights are read: a base may be larger than the memory.
    def prove(
        layer: Any, inputs: Tensor, options: Options, expected: Tensor, attention_options: Options
    ) -> None:
        scale, angles = attention_options.get("scaling"), options["position_embeddings"]
        if scale is None or angles[0].shape[-1] != layer.self_attn.head_dim:
            return
        candidate = FusedLayer(layer, scale, attention_options.get("sliding_window") or None)
        # The packing that reached the layer: virtual tokens may have joined it.
        own = options["packing"]
        y = candidate.forward(inputs, position_embeddings=angles, packing=own, arena=arena)
        if y is not None and _is_near(y, expected, inputs):
            proven.append(candidate)

    with torch.no_grad(), _watched(model, likely, prove):
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        decoder(input_ids=tokens, position_ids=places, packing=packing, use_cache=False)
    return tuple(proven)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let `model` attend by the implementation that transformers knows as `name`."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _watched(
    model: PreTrainedModel, layers: Sequence[nn.Module], watch: Callable[..., None]
) -> Iterator[None]:
    """Call `watch` after each layer of a pass, with the layer, its input, its options, its output
    and the options of its attention."""
    attention_options: dict[nn.Module, Options] = {}

    def note_call(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        passed = "position_embeddings" in kwargs and "packing" in kwargs
        if args and passed and isinstance(output, Tensor):
            watch(layer, args[0], kwargs, output, attention_options.get(layer.self_attn, {}))

    def note_options(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
        attention_options[module] = options
        return packed_attention(module, *args, **options)

    ALL_ATTENTION_FUNCTIONS.register(f"{NAME}_watched", note_options)
    hooks = [layer.register_forward_hook(note_call, with_kwargs=True) for layer in layers]
    try:
        with attention(model, f"{NAME}_watched"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        attention_options.clear()  # the registry keeps `note_options`, but not the model


def looks_fusable(layer: nn.Module) -> bool:
    """Return whether a decoder layer has the structure that the two functions compute."""
    for path, names in SUBMODULES.items():
        module = getattr(layer, path, None) if path else layer
        if module is None or {name for name, _ in module.named_children()} != names:
            return False
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(isinstance(getattr(n, "weight", None), Tensor) and _eps(n) for n in norms):
        return False
    attend: Any = layer.self_attn
    return hasattr(attend, "head_dim") and not getattr(attend, "attention_dropout", 0.0)


def _is_near(y: Tensor, expected: Tensor, inputs: Tensor) -> bool:
    """Return whether the layer's change of every token is near the expected one, but for the
    rounding of the sum. Token by token: one large row must not hide the others."""
    dtype = expected.dtype
    y, expected, inputs = y.double(), expected.double(), inputs.double()
    allowed = TOLERANCE[dtype] * (expected - inputs).norm(dim=-1)
    allowed += torch.finfo(dtype).eps * expected.norm(dim=-1)
    return bool(((y - expected).norm(dim=-1) <= allowed).all())


def _projection(layer: nn.Module) -> Projection | None:
    if isinstance(layer, LoRALinear):
        return layer.projection()
    if any(p.requires_grad for p in layer.parameters()):
        return None
    if isinstance(layer, QuantizedLinear):
        return Projection.plain(layer.quantized_weight, layer.bias)
    if type(layer) is nn.Linear:
        return Projection.plain(layer.weight, layer.bias)
    return None


def _weights(norms: Sequence[Norm]) -> list[Tensor]:
    return [norm.weight for norm in norms if norm.weight is not None]


def norm_of(layer: Any) -> Norm:
    """Return an RMSNorm's weight and eps."""
    return Norm(layer.weight, eps=_eps(layer), rounds=True)


def _eps(layer: Any) -> float:
    """Return an RMSNorm's eps, by either name; 0 where it has none."""
    return float(getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None) or 0.0)
