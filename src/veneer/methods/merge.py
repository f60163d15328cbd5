"""Bake the acting adapters into a plain model."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.errors import AdapterError
from veneer.frozen.packed import named_frozen
from veneer.lowrank.layers import lora_layers
from veneer.methods.attach import adapters, in_use
from veneer.methods.config import is_virtual
from veneer.methods.virtual import take_virtual
from veneer.methods.vocabulary import bake_words, new_words

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
    shared = [*model.parameters(), *model.buffers()]
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    words = new_words(plain)
    take_virtual(plain, set(adapters(plain)))
    for path, layer in list(lora_layers(plain)):
        plain.set_submodule(path, layer.fuse() if layer.active() else layer.original)
    for path, packed in named_frozen(plain).items():
        plain.set_submodule(path, packed.plain())
    if words is not None:
        bake_words(plain, words)
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    if embedding is not None and head is not None and embedding.weight is not head.weight:
        # An adapter of one leaves the other as it was, so the two are no longer tied.
        plain.config.tie_word_embeddings = False
    # A trainer may have put a forward of its own on the model (TRL's head, accelerate's autocast),
    # which would go on computing with the model that it was put on.
    for ours in ("veneer_route", "veneer_marks", "forward", "_original_forward"):
        plain.__dict__.pop(ours, None)
    return plain


def why_not_mergeable(model: nn.Module) -> str | None:
    """Return why what acts on the model cannot become part of its weights, or None if it can."""
    for name, config in adapters(model).items():
        if is_virtual(config) and name in in_use(model):
            return f"the virtual tokens of {name!r} are no weights."
    return None


def rounded_away(model: nn.Module, plain: nn.Module) -> float:
    """Return the part of the acting adapters' change that rounding took from the merged weights.

    ‖merged − (W + ΔW)‖ / ‖ΔW‖ over all adapted layers: 0 is a perfect merge, and at 1 the merged
    model is as far from what was learnt as the base is.
    """
    error = change = 0.0
    for path, layer in lora_layers(model):
        weight = layer.frozen_weight.float()
        delta = layer.delta()
        place: Any = plain.get_submodule(path)
        merged = (place.weight.T if isinstance(place, Conv1D) else place.weight).float()
        # Not merged - (weight + delta), a sum in which float32 itself may lose the delta.
        error += float(((merged - weight) - delta).square().sum())
        change += float(delta.square().sum())
    return (error / change) ** 0.5 if change else 0.0
