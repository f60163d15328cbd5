"""Bake the acting adapters into a plain model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.attach import adapters, in_use
from veneer.adapter.layers import lora_layers
from veneer.adapter.method import is_virtual
from veneer.adapter.modules_to_save import home
from veneer.adapter.new_tokens import is_tied, merge_tokens, new_tokens_of
from veneer.adapter.virtual_forward import detach_virtual_tokens
from veneer.errors import AdapterError
from veneer.quant.weight import QuantizedWeight, quantized_layers

Model = TypeVar("Model", bound=PreTrainedModel)


def merge(model: Model) -> Model:
    """Return a plain model with W + scaling · B A in place of W, for the adapters in use.

    Raises AdapterError where what acts is no weight.

    The given model is not touched, so that going back is using it: the result shares with it every
    tensor that no adapter changes. Sums are made in float32 and rounded once. Packed weights are
    unpacked, for a plain model knows nothing of them.
    """
    if why := why_not_mergeable(model):
        raise AdapterError(f"This model cannot be merged: {why}")
    active_adapters = active_adapters_of(model)
    saved = [
        weight
        for weights in (active_adapters.base, *active_adapters.saved.values())
        for weight in weights.values()
    ]
    shared = [*model.parameters(), *model.buffers(), *saved]
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    new_tokens = new_tokens_of(plain)
    embedding, head = _ends(plain)
    tied = embedding is not None and head is not None and is_tied(embedding, head)
    detach_virtual_tokens(plain, set(adapters(plain)))
    for path, layer in list(lora_layers(plain)):
        layer.take_off(plain, path, merged=layer.acts)
    for path, packed in quantized_layers(plain).items():
        plain.set_submodule(path, packed.to_dense())
    if new_tokens is not None:
        merge_tokens(plain, new_tokens)
    for path in active_adapters.base:  # saved weights are the adapter's, which may train on
        owner, leaf = home(plain, path)
        weight: Any = owner._parameters[leaf]
        owner._parameters[leaf] = nn.Parameter(weight.detach().clone(), False)
    embedding, head = _ends(plain)
    if embedding is not None and head is not None and embedding.weight is not head.weight:
        if tied and torch.equal(embedding.weight, head.weight):  # rows of both have changed alike
            head.weight = embedding.weight
        else:
            # An adapter of one leaves the other as it was, so the two are no longer tied.
            plain.config.tie_word_embeddings = False
    # A trainer may have put a forward of its own on the model (TRL's head, accelerate's autocast),
    # which would go on computing with the model that it was put on.
    for ours in ("veneer_active_adapters", "veneer_marks", "forward", "_original_forward"):
        plain.__dict__.pop(ours, None)
    return plain


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the embedding and the head of a model, or None for what it does not have."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # as transformers has it for models that read no words
        return None, None


def why_not_mergeable(model: nn.Module) -> str | None:
    """Return why what acts on the model cannot become part of its weights, or None if it can."""
    for name, config in adapters(model).items():
        if is_virtual(config) and name in in_use(model):
            return f"the virtual tokens of {name!r} are no weights."
    for path, layer in lora_layers(model):
        biases = [adapter.lora_bias is not None for adapter, _ in layer.active()]
        if any(biases) and getattr(layer.original, "bias", None) is None:
            return f"its adapter has a bias over {path}, and the model's own has no place for one."
    return None


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """What rounding took from the change ΔW of one layer, as Frobenius norms.

    change: ‖ΔW‖. rounded: ‖merged − (W + ΔW)‖, in the merged model's dtype; in_float32: what it
    would be in that one; packed_again: where W is packed, what it would be packed again as it was.
    """

    path: str
    change: float
    rounded: float
    in_float32: float
    packed_again: float | None = None

    @property
    def lost(self) -> float:
        """The share of the change that is lost: at 1 the layer is as far from it as the base is."""
        return self.rounded / self.change if self.change else 0.0


def layer_losses(model: nn.Module, plain: nn.Module) -> list[LayerLoss]:
    """Return what rounding took from each layer that acting adapters change."""
    losses = []
    for path, layer in lora_layers(model):
        if not layer.active():
            continue
        weight, delta = layer.dense_base_weight.float(), layer.delta()
        merged = layer.weight_in(plain, path).float()
        # Not merged - (weight + delta), a sum in which float32 itself may lose the delta.
        rounded = _norm((merged - weight) - delta)
        exact = weight + delta
        again = None
        if isinstance(layer.base_weight, QuantizedWeight):
            packed = layer.base_weight.quantize(exact, torch.float32)
            again = _norm((packed.dequantize() - weight) - delta)
        losses.append(
            LayerLoss(path, _norm(delta), rounded, _norm((exact - weight) - delta), again)
        )
    return losses


def rounded_away(model: nn.Module, plain: nn.Module) -> float:
    """Return the part of the acting adapters' change that rounding took from the merged weights.

    ‖merged − (W + ΔW)‖ / ‖ΔW‖ over all adapted layers: 0 is a perfect merge, and at 1 the merged
    model is as far from what was learnt as the base is.
    """
    losses = layer_losses(model, plain)
    return share((loss.rounded for loss in losses), losses)


def share(errors: Iterable[float], losses: Sequence[LayerLoss]) -> float:
    """Return ‖errors‖ / ‖ΔW‖, with one error for each layer; 0 where nothing changed."""
    change = math.hypot(*(loss.change for loss in losses))
    return math.hypot(*errors) / change if change else 0.0


def _norm(matrix: Tensor) -> float:
    """Return ‖matrix‖, infinite where something in it is no number."""
    norm = float(matrix.norm())
    return math.inf if math.isnan(norm) else norm
