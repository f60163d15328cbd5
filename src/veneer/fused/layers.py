"""Which decoder layers can be computed as the two functions of `fused/block.py`, and doing it.

A layer is known by its parts' names (those of LLaMA, Mistral, Qwen2 and their like) and then proven
by numbers: its own forward, with whatever scaling, window or multiplier it brings, must give what
the two functions give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.adapter.linear import LoRALinear
from veneer.fused.block import FeedForward, Norm, SelfAttention
from veneer.kernels.arena import Arena
from veneer.kernels.attention import NAME, Attention, Packing, packed_attention
from veneer.lowrank.projection import Projection
from veneer.models.blocks import decoder_layers
from veneer.quant.weight import QuantizedLinear

PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


# How far a shortcut may be from the model's own way, relatively: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


Angles = tuple[Tensor, Tensor]  # cos and sin, (1, tokens, head_dim)
Options = dict[str, Any]  # what a layer is given, or asks of attention


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer of this model that may be computed as two functions."""

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
        """Return the layer's output, or None where adapters or a prefix need the general way."""
        layer: Any = self.layer
        dtype = hidden_states.dtype
        found = self._projections()
        autocast = torch.is_autocast_enabled(hidden_states.device.type)
        if found is None or packing.prefix is not None or autocast:
            return None
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if {part.weight.dtype for part in (*found, *norms)} != {dtype}:
            return None
        q, k, v, o, gate, up, down = found
        cos, sin = (x[0].to(dtype).contiguous() for x in position_embeddings)
        first = SelfAttention(
            norm=norm_of(layer.input_layernorm),
            inputs=(q, k, v),
            output=o,
            attention=Attention(packing, self.scale, self.window),
            cos=cos,
            sin=sin,
            arena=arena,
            recompute_projections=recompute_projections,
        )
        norm = norm_of(layer.post_attention_layernorm)
        x, summands = first(hidden_states[0])
        return FeedForward(norm, (gate, up), down, arena, recompute_projections, summands)(
            x
        ).unsqueeze(0)

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
        """Return whether the layer's adapters, as they act now, allow for it."""
        return self._projections() is not None

    def _projections(self) -> list[Projection] | None:
        if any(norm.weight.requires_grad for norm in self.norms()):
            return None
        linears = self.linears()
        found = [projection for layer in linears if (projection := _projection(layer)) is not None]
        return found if len(found) == len(linears) else None


def fused_layers(model: PreTrainedModel, tokens: Tensor) -> tuple[FusedLayer, ...]:
    """Return the layers of `model` that the two functions compute rightly.

    tokens (1, tokens): a short text to prove it on. The model is in evaluation mode, and takes
    packed rows.
    """
    likely = [layer for layer in model.modules() if _is_likely(layer)]
    if not likely:
        return ()
    packing, arena = Packing([tokens.shape[1]], model.device), Arena()
    decoder: Any = model.get_decoder()
    proven: list[FusedLayer] = []

    # At once, while the layer's weights are at hand: a base may be larger than the memory.
    def prove(layer: Any, inputs: Tensor, given: Options, wanted: Tensor, asked: Options) -> None:
        scale, angles = asked.get("scaling"), given["position_embeddings"]
        if scale is None or angles[0].shape[-1] != layer.self_attn.head_dim:
            return
        found = FusedLayer(layer, scale, asked.get("sliding_window") or None)
        # The packing that reached the layer: virtual tokens may have joined it.
        own = given["packing"]
        ours = found.forward(inputs, position_embeddings=angles, packing=own, arena=arena)
        if ours is not None and _is_near(ours, wanted, inputs):
            proven.append(found)

    with torch.no_grad(), _watched(model, likely, prove):
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        decoder(input_ids=tokens, position_ids=places, packing=packing, use_cache=False)
    return tuple(proven)


@contextmanager
def fused(
    layers: Sequence[FusedLayer], arena: Arena, *, recompute_projections: bool = False
) -> Iterator[None]:
    """Compute `layers` as two functions each while the context lasts.

    A layer that something else than a plain adapter acts on takes its own forward as before.
    """
    with _overridden(
        {found.layer: _as_two(found, arena, recompute_projections) for found in layers}
    ):
        yield


@contextmanager
def checkpointed(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Keep of each decoder layer only its input while the context lasts, and compute it again in
    the backward pass, with the attention that transformers knows as `name`."""

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(
            checkpoint,
            forward,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), attention(model, name)),
        )

    with _overridden({layer: twice(layer.forward) for layer in decoder_layers(model) or ()}):
        yield


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


def _as_two(
    fused_layer: FusedLayer, arena: Arena, recompute_projections: bool
) -> Callable[..., Tensor]:
    own: Callable[..., Tensor] = fused_layer.layer.forward

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        found = fused_layer.forward(
            hidden_states,
            position_embeddings=options["position_embeddings"],
            packing=options["packing"],
            arena=arena,
            recompute_projections=recompute_projections,
        )
        return own(hidden_states, **options) if found is None else found

    return forward


@contextmanager
def _overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    for layer, new in forwards.items():
        layer.forward = new
    try:
        yield
    finally:
        for layer, old in before.items():
            del layer.forward
            if old is not None:
                layer.forward = old


@contextmanager
def _watched(
    model: PreTrainedModel, layers: Sequence[nn.Module], see: Callable[..., None]
) -> Iterator[None]:
    """Let `see` have each layer as it is computed, with its input, options and output, and what its
    attention was asked for."""
    options: dict[nn.Module, Options] = {}

    def note_call(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        passed = "position_embeddings" in kwargs and "packing" in kwargs
        if args and passed and isinstance(output, Tensor):
            see(layer, args[0], kwargs, output, options.get(layer.self_attn, {}))

    def note_options(module: nn.Module, *args: Any, **asked: Any) -> tuple[Tensor, None]:
        options[module] = asked
        return packed_attention(module, *args, **asked)

    ALL_ATTENTION_FUNCTIONS.register(f"{NAME}_watched", note_options)
    hooks = [layer.register_forward_hook(note_call, with_kwargs=True) for layer in layers]
    try:
        with attention(model, f"{NAME}_watched"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        options.clear()  # the registry keeps `note_options`, which must not keep the model


def _is_likely(layer: nn.Module) -> bool:
    for path, names in PARTS.items():
        part = getattr(layer, path, None) if path else layer
        if part is None or {name for name, _ in part.named_children()} != names:
            return False
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(isinstance(getattr(n, "weight", None), Tensor) and _eps(n) for n in norms):
        return False
    attend: Any = layer.self_attn
    return hasattr(attend, "head_dim") and not getattr(attend, "attention_dropout", 0.0)


def _is_near(found: Tensor, wanted: Tensor, inputs: Tensor) -> bool:
    """Return whether the layer's change of every token is near what it should be, but for the
    rounding of the sum. Token by token: one large row must not hide the others."""
    dtype = wanted.dtype
    found, wanted, inputs = found.double(), wanted.double(), inputs.double()
    allowed = TOLERANCE[dtype] * (wanted - inputs).norm(dim=-1)
    allowed += torch.finfo(dtype).eps * wanted.norm(dim=-1)
    return bool(((found - wanted).norm(dim=-1) <= allowed).all())


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


def norm_of(layer: Any) -> Norm:
    """Return an RMSNorm's weight and eps."""
    return Norm(layer.weight, _eps(layer))


def _eps(layer: Any) -> float:
    """Return an RMSNorm's eps, by either name; 0 where it has none."""
    return float(getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None) or 0.0)
