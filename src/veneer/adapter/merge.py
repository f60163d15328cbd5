"""Merge the adapters in use into a plain model, and measure what rounding takes from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.invocation import invoked
from veneer.adapter.layers import lora_layers
from veneer.adapter.method import is_virtual
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.new_tokens import is_tied, merge_tokens, new_tokens_of
from veneer.adapter.score import scores
from veneer.adapter.use import adapters, in_use
from veneer.adapter.virtual_forward import detach_virtual_tokens
from veneer.errors import AdapterError
from veneer.models.block_buffers import passes_of
from veneer.models.score import remove_score
from veneer.quant.stack import QuantizedStack, quantized_modules
from veneer.quant.weight import QuantizedWeight, dense

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Return a plain model with W + scaling · B A in place of W, for the adapters in use.

    The given model stays as it is, so that there is nothing to undo; both share every tensor that
    no adapter changes. Sums are made in float32 and rounded once. Quantized weights are
    dequantized, since a plain model has none. Raises AdapterError where an adapter in use changes
    more than weights.
    """
    if why := why_not_mergeable(model):
        raise AdapterError(f"This model cannot be merged: {why}")
    active_adapters = active_adapters_of(model)
    beside = (active_adapters.replaced, *active_adapters.modules_to_save.values())
    shared = [*model.parameters(), *model.buffers(), *chain(*(x.values() for x in beside))]
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    new_tokens = new_tokens_of(plain)
    embedding, head = _ends(plain)
    tied = embedding is not None and head is not None and is_tied(embedding, head)
    detach_virtual_tokens(plain, set(adapters(plain)))
    remove_score(plain)  # of a reward model that is attached beside, in another job or in none
    for path, layer in list(lora_layers(plain)):
        layer.unwrap(plain, path, merged=layer.acts)
    for path, quantized in quantized_modules(plain).items():
        if not isinstance(quantized, QuantizedStack):
            plain.set_submodule(path, quantized.to_dense())
            continue
        owner, name = owner_of(plain, path)
        del owner._modules[name]
        owner.register_parameter(name, nn.Parameter(quantized.dense(), False))
    if new_tokens is not None:
        assert isinstance(plain, PreTrainedModel)
        merge_tokens(plain, new_tokens)
    for path in active_adapters.replaced:  # modules to save are the adapter's, which may train on
        owner, name = owner_of(plain, path)
        weight: Any = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(weight.detach().clone(), False)
    embedding, head = _ends(plain)
    if embedding is not None and head is not None and embedding.weight is not head.weight:
        if tied and torch.equal(embedding.weight, head.weight):  # both have the same new rows
            head.weight = embedding.weight
        else:
            # An adapter changed only one of them.
            assert isinstance(plain, PreTrainedModel)
            plain.config.tie_word_embeddings = False
    # A trainer may have set a forward of its own on the model (TRL's head, accelerate's autocast),
    # which would go on computing with the model that it was set on.
    for name in ("veneer_active_adapters", "veneer_marks", "forward", "_original_forward"):
        plain.__dict__.pop(name, None)
    return plain


def _ends(model: nn.Module) -> tuple[Any, Any]:
    """Return the embedding and the head of a model, or None where it has none."""
    if not isinstance(model, PreTrainedModel):  # a person's own modules
        return None, None
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # of models that read no tokens
        return None, None


def why_not_mergeable(model: nn.Module, command: str = "veneer merge") -> str | None:
    """Return why the adapters in use cannot be merged into weights, or None if they can.

    command: by which they can be later, if they can.
    """
    if (passes := passes_of(model)) is not None:
        return f"{passes.why_not_whole}. To make one: {command}"
    if ranking := [name for name in in_use(model) if scores(model, name)]:
        return f"{', '.join(ranking)} is a reward model, whose head a language model does not have."
    if new_tokens_of(model) and not isinstance(model, PreTrainedModel):
        return "it has new tokens within a module of your own; merge transformers' model in that."
    for name, config in adapters(model).items():
        if is_virtual(config) and name in in_use(model):
            return f"the virtual tokens of {name!r} are no weights."
    if names := invoked(model):
        return (
            f"{', '.join(names)} acts from an invocation on, and a merged weight would act on all "
            "tokens; serve the adapter over its base."
        )
    for path, layer in lora_layers(model):
        biases = [adapter.lora_bias is not None for adapter, _ in layer.active()]
        if any(biases) and getattr(layer.original, "bias", None) is None:
            return f"its adapter has a bias over {path}, and the model's own has no place for one."
    return None


@dataclass(frozen=True, slots=True)
class LayerRounding:
    """What rounding takes from the change ΔW of one layer, as Frobenius norms.

    change: ‖ΔW‖. error: ‖merged − (W + ΔW)‖ in the merged model's dtype. error_in_float32: the same
    in float32. error_requantized: the same after quantizing again, where W is quantized.
    """

    path: str
    change: float
    error: float
    error_in_float32: float
    error_requantized: float | None = None

    @property
    def lost(self) -> float:
        """‖error‖ / ‖ΔW‖; at 1 the merged layer is as far from what was learnt as the base's is."""
        return relative_error([self.error], [self])


def layer_roundings(model: nn.Module, plain: nn.Module) -> list[LayerRounding]:
    """Return what rounding took from each layer that the adapters in use change."""
    roundings = []
    for path, layer in lora_layers(model):
        if not layer.active():
            continue
        matrices = zip(layer.changes(), layer.matrices_in(plain, path), strict=True)
        each = [_rounding(path, *change, merged) for change, merged in matrices]
        requantized = [x.error_requantized for x in each if x.error_requantized is not None]
        roundings.append(
            LayerRounding(
                path,
                math.hypot(*(x.change for x in each)),
                math.hypot(*(x.error for x in each)),
                math.hypot(*(x.error_in_float32 for x in each)),
                math.hypot(*requantized) if requantized else None,
            )
        )
    return roundings


def _rounding(
    path: str, base: Tensor | QuantizedWeight, delta: Tensor, merged: Tensor
) -> LayerRounding:
    """Return what rounding took from the change of one matrix."""
    weight, merged = dense(base).float(), merged.float()
    exact = weight + delta
    # Not merged - (weight + delta), a sum in which float32 itself may lose the delta.
    error, in_float32 = _norm((merged - weight) - delta), _norm((exact - weight) - delta)
    requantized = None
    if isinstance(base, QuantizedWeight):
        again = base.requantized(exact, torch.float32)
        if again is not None:
            requantized = _norm((again.dequantize() - weight) - delta)
    return LayerRounding(path, _norm(delta), error, in_float32, requantized)


def rounded_away(model: nn.Module, plain: nn.Module) -> float:
    """Return ‖merged − (W + ΔW)‖ / ‖ΔW‖ over all layers that the adapters in use change.

    0 is a perfect merge; at 1 the merged model is as far from what was learnt as the base is.
    """
    roundings = layer_roundings(model, plain)
    return relative_error((layer.error for layer in roundings), roundings)


def relative_error(errors: Iterable[float], layers: Sequence[LayerRounding]) -> float:
    """Return ‖errors‖ / ‖ΔW‖, with one error for each layer; 0 where nothing changed."""
    change = math.hypot(*(layer.change for layer in layers))
    return math.hypot(*errors) / change if change else 0.0


def _norm(matrix: Tensor) -> float:
    """Return ‖matrix‖, infinite where it has a NaN."""
    norm = float(matrix.norm())
    return math.inf if math.isnan(norm) else norm
