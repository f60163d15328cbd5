"""Which decoder layers of a model are computed as two functions, and why the others are not.

A layer is recognised by its structure (fused/watch.py, fused/analyse.py) and then proven by
numbers: its own output, with whatever scaling, window or multiplier it has, must be what the two
functions give. What the structure leaves open is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.virtual_forward import virtual_input_count
from veneer.adapter.wrapper import is_intercepted
from veneer.fused.analyse import structure_of
from veneer.fused.block import FeedForward, Mixture, SelfAttention, normed
from veneer.fused.heads import LatentHeads
from veneer.fused.layers import FusedLayer, submodules
from veneer.fused.norms import norm_of
from veneer.fused.patches import LayerForward, patched
from veneer.fused.rotaries import Rotaries
from veneer.fused.structure import (
    FeedForwardStructure,
    LayerStructure,
    MixtureStructure,
    Turn,
    Variant,
)
from veneer.fused.watch import LayerPass, attention_is_asked_for, known_mask, watch
from veneer.kernels.activation import Activation, activation_of
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Packing
from veneer.kernels.norm import Norm
from veneer.kernels.wide import wide
from veneer.models.blocks import decoder_layers

# How far a shortcut may be from the model's own way, relatively: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

NUMBERS = ("layer_idx", "layer_id", "layer_number")  # attributes that hold a layer's place
MULTIPLIERS = ("multiplier", "scale")  # in names of what a layer multiplies its halves with
SETTING = (bool, int, float, str)
Recognised = dict[str, FusedLayer | str]  # by path: the layer, or why it is not computed so


def recognise(model: PreTrainedModel, tokens: Tensor) -> Recognised:
    """Return each decoder layer as it can be computed as two functions, or why it cannot.

    tokens (1, tokens): a short text for the proof. The model is in evaluation mode.
    """
    layers = decoder_layers(model)
    if layers is None:
        return {}
    paths = {layer: path for path, layer in model.named_modules() if layer in set(layers)}
    recognised: Recognised = dict.fromkeys(paths.values(), "it does not pass on hidden states")
    packing = Packing([tokens.shape[1]], model.device)
    trial = _Trial(model, packing)
    intercepted = {layer for layer in layers if any(map(is_intercepted, submodules(layer)))}

    def look(watched: LayerPass) -> None:
        why = "hooks or forwards of others are set in it" if watched.layer in intercepted else None
        recognised[paths[watched.layer]] = why or trial.proven(watched)

    with torch.no_grad():
        try:
            watch(model, list(layers), _inputs(model, tokens, packing), packing, look)
        except Exception as error:  # whatever a foreign architecture raises
            why = f"{type(error).__name__}: {error}"
            return {path: why if isinstance(it, str) else it for path, it in recognised.items()}
    return recognised


def structures(model: PreTrainedModel) -> list[LayerStructure | str]:
    """Return each decoder layer's structure, or why it cannot be computed as two functions, without
    a proof: from a model that may be on the meta device. Of layers that are alike, one is read."""
    layers = decoder_layers(model)
    if layers is None:
        return []
    kinds = [_kind(layer) for layer in layers]
    first: dict[Hashable, nn.Module] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        first.setdefault(kind, layer)
    outputs = {layer: _Once(layer.forward) for layer in first.values()}
    passing = {layer: outputs[first[kind]] for kind, layer in zip(kinds, layers, strict=True)}
    tokens = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    packing = Packing([4], model.device)
    read: dict[nn.Module, LayerStructure | str] = {}
    why = "it does not pass on hidden states"

    def look(watched: LayerPass) -> None:
        read[watched.layer] = structure_of(watched)

    with torch.no_grad(), patched(passing):
        try:
            watch(model, [*outputs], _inputs(model, tokens, packing), packing, look)
        except Exception as error:  # whatever a foreign architecture raises
            why = f"{type(error).__name__}: {error}"
    return [read.get(first[kind], why) for kind in kinds]


class _Once:
    """A layer's forward that gives later calls, of layers alike, what it has given the first."""

    def __init__(self, forward: LayerForward) -> None:
        self.forward, self.output = forward, None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.output is None:
            self.output = self.forward(*args, **options)
        return self.output


def _kind(layer: nn.Module) -> Hashable:
    """Return what decides how a layer computes: the types, settings and shapes of its submodules.

    A setting that holds the layer's number in the model is none.
    """
    return tuple(
        (
            *(path, type(module), id(getattr(module, "config", None))),
            *(x for x in vars(module).items() if x[0] not in NUMBERS and isinstance(x[1], SETTING)),
            *((name, weight.shape) for name, weight in module.named_parameters(recurse=False)),
        )
        for path, module in layer.named_modules()
    )


def _inputs(model: PreTrainedModel, tokens: Tensor, packing: Packing) -> dict[str, Any]:
    """Return the decoder's arguments for one row at the far end of the model's context, where what
    depends on positions shows most."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 0
    length = tokens.shape[1]
    first = max(0, context - length - virtual_input_count(model))
    positions = torch.arange(first, first + length, device=tokens.device)[None]
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
    if tokens.is_meta:  # whose values no code can look at to make a mask
        inputs["attention_mask"] = torch.zeros(1, 1, length, length, device="meta")
    return {**inputs, "packing": packing} if attention_is_asked_for(model) else inputs


@dataclass
class _Trial:
    """Tries what a structure leaves open. `variants`: those that were right for earlier layers."""

    model: PreTrainedModel
    packing: Packing
    arena: Arena = field(default_factory=Arena)
    variants: list[Variant] = field(default_factory=list)

    def proven(self, watched: LayerPass) -> FusedLayer | str:
        structure = structure_of(watched)
        if isinstance(structure, str):
            return structure
        norms = _norms(watched, structure)
        if isinstance(norms, str):
            return norms
        activations: Sequence[Activation] = get_args(Activation)
        half = structure.feed_forward
        if isinstance(half, MixtureStructure):
            activations = activations[:1]  # the mixture has its own
        elif path := half.activation:
            known = activation_of(watched.layer.get_submodule(path))
            if known is None:
                return f"{path} is no activation that is known"
            activations = [known]
        scaling = _query_scaling(self.model)
        base = FusedLayer(watched.layer, structure, Variant(), norms, scaling)
        if not base.applies():
            return "norms or biases in it train"
        tried = self._variants(watched, base, activations)
        for variant in [*self.variants, *(v for v in tried if v not in self.variants)]:
            candidate = replace(base, variant=variant)
            if self._gives(candidate, watched):
                self.variants = [variant, *(v for v in self.variants if v != variant)]
                return candidate
        return "its numbers are others than those of the two functions"

    def _variants(
        self, watched: LayerPass, base: FusedLayer, activations: Sequence[Activation]
    ) -> Iterator[Variant]:
        attention, feed_forward = base.structure.attention, base.structure.feed_forward
        is_gated = isinstance(feed_forward, FeedForwardStructure) and feed_forward.is_gated
        separate, angles = len(attention.read_by_heads) == 3, watched.options["position_embeddings"]
        multipliers = {1.0} | {
            value
            for name, value in vars(watched.layer).items()
            if isinstance(value, float) and any(word in name for word in MULTIPLIERS)
        }
        for activation, order, turn, gate_first, multiplier, scales, prescaled in itertools.product(
            activations,
            ("separate",) if separate else ("blocks", "by key head"),
            ("none",) if angles is None else get_args(Turn),
            (True, False) if is_gated else (True,),
            sorted(multipliers, reverse=True),
            (False,) if base.query_scaling is None else (True, False),
            (False, True) if attention.scale == 1 else (False,),
        ):
            yield Variant(
                order=order,  # type: ignore[arg-type]
                turn=turn,
                activation=activation,
                gate_first=gate_first,
                multiplier=multiplier,
                scales_queries=scales,
                prescaled=prescaled,
            )

    def _gives(self, candidate: FusedLayer, watched: LayerPass) -> bool:
        """Return whether the two functions give the layer's own output."""
        options = watched.options
        packing = options.get("packing") or self.packing
        if packing.tokens != watched.x.shape[1]:
            return False  # virtual tokens have joined, and the layer is not told of them
        of_pass: dict[str, Any] = {
            "position_embeddings": options["position_embeddings"],
            "position_ids": options.get("position_ids"),
            "packing": packing,  # that reached the layer: virtual tokens may have joined it
            "rotaries": Rotaries(),
            "arena": self.arena,
            "mask_of": known_mask,
        }
        halves = candidate.halves(watched.x, **of_pass)
        if halves is None or not _gives_within(candidate, *halves, watched):
            return False
        if isinstance(halves[1], Mixture):
            return True  # of which each step has been judged
        y = candidate.forward(watched.x, **of_pass)
        return y is not None and _is_near(y, watched.y, watched.x)


def _norms(watched: LayerPass, structure: LayerStructure) -> dict[str, Norm] | str:
    """Return the norms of a layer by path, without weights, or which one is not known."""
    dims = {call.path: call for call in (*watched.before, *watched.after)}
    norms = {}
    for path in structure.norms:
        module, call = watched.layer.get_submodule(path), dims[path]
        norm = norm_of(module, call.x.shape[-1])
        if norm is None:
            return f"{path} is no norm that is known"
        norms[path] = replace(norm, weight=None, bias=None)
    return norms


def _query_scaling(model: PreTrainedModel) -> tuple[float, int] | None:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    beta, context = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return None if beta is None or context is None else (float(beta), int(context))


def _gives_within(
    layer: FusedLayer, first: SelfAttention, second: FeedForward | Mixture, watched: LayerPass
) -> bool:
    """Return whether the halves give the queries and keys that attention has read, and what the
    last projection has: beside a large residual, or behind small weights, these would not show.

    Around a mixture each step is judged from what the layer itself read: where two experts are
    nearly equal for a token, the rounding of attention decides between them.
    """
    calls = {call.path: call for call in (*watched.before, *watched.after)}
    attention, feed_forward = layer.structure.attention, layer.structure.feed_forward
    attended = watched.attended
    assert attended is not None
    heads = first.heads
    if heads.rotary is not None and 2 * heads.rotary.cos.shape[1] > heads.turning:
        return False  # its kernel would write beyond the heads
    q, k, _ = heads.forward([_flat(calls[path].y) for path in attention.read_by_heads])
    own_q, own_k = (x[0].transpose(0, 1) for x in (attended.q, attended.k))
    k = k.repeat_interleave(own_k[0].numel() // k[0].numel(), 1)  # where it is shared beforehand
    layouts = [(q, k)]
    if isinstance(heads, LatentHeads) and heads.rotary is not None and heads.rotary.interleaved:
        # Its own code may leave pairs apart. Of other heads, a prefix may have keys in that order.
        layouts.append((_with_pairs_apart(q, heads), _with_pairs_apart(k, heads)))
    if not any(
        _is_near(q.flatten(1) * layer.scale, own_q.flatten(1) * attention.scale)
        and _is_near(k.flatten(1), own_k.flatten(1))
        for q, k in layouts
    ):
        return False
    if isinstance(second, FeedForward):
        assert isinstance(feed_forward, FeedForwardStructure)
        inner, _ = second.forward([_flat(calls[path].y) for path in feed_forward.inputs])
        return _is_near(inner, _flat(calls[feed_forward.output].x))
    assert isinstance(feed_forward, MixtureStructure)
    module = calls[feed_forward.module]
    between = _flat(calls[feed_forward.norm or feed_forward.module].x)
    x, normed_x = _flat(watched.x), _flat(module.x)
    y = second.routed(normed_x)  # which may need more than what it reads
    return (
        _is_near(first(x)[0], between, x)
        and _is_near(normed(between, second.norm), normed_x)
        and _is_near(y, module.y.view_as(y))
        and _is_near(second.add(between, y), _flat(watched.y), between)
    )


def _with_pairs_apart(x: Tensor, heads: LatentHeads) -> Tensor:
    """Return q or k (tokens, heads, head_dim) with the first ones of all pairs that turn before the
    second ones: the product of both is the same."""
    assert heads.rotary is not None
    first, pairs = heads.first_turning, heads.rotary.cos.shape[1]
    turned = x[..., first : first + 2 * pairs].unflatten(-1, (pairs, 2)).mT.flatten(-2)
    return torch.cat([x[..., :first], turned, x[..., first + 2 * pairs :]], -1)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)  # (tokens, dim)


def _is_near(y: Tensor, expected: Tensor, inputs: Tensor | None = None) -> bool:
    """Return whether the layer's change of every token is near the expected one, but for the
    rounding of the sum. Token by token: one large row must not hide the others."""
    dtype = y.dtype
    y, expected = wide(y), wide(expected)
    change = expected if inputs is None else expected - wide(inputs)
    allowed = TOLERANCE[dtype] * change.norm(dim=-1)
    allowed += torch.finfo(dtype).eps * expected.norm(dim=-1)
    return bool(((y - expected).norm(dim=-1) <= allowed).all())
