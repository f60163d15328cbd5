"""What of a stored adapter does not fit a model, all of it, before any of it is laid over it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.adapter.conv import why_not_adaptable
from veneer.adapter.method import Method
from veneer.adapter.new_tokens import is_tied, new_tokens_of
from veneer.adapter.targets import Layer, adaptable_layers, adaptable_parameters, resolve
from veneer.adapter.unfreeze import replaced_weights
from veneer.adapter.virtual import virtual_shape
from veneer.errors import MOST_PROBLEMS, ConfigError, listed, nearest, shortened
from veneer.formats.parts import shared_tokens
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.quant.weight import QuantizedLinear, quantized_layers

# No trained weight comes near it, and from there on products of a few overflow.
LARGEST_NUMBER = 2.0**32

if TYPE_CHECKING:
    from veneer.formats.state import AdapterState, Rows, StoredLayer


def validate(
    model: PreTrainedModel,
    state: AdapterState,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    force: bool,
) -> list[str]:
    """Return all that keeps an adapter from `model`: a foreign base (unless `force`), keys that are
    missing or belong nowhere, wrong shapes, values that are not finite."""
    problems = [] if force else _foreign(model, state, tokenizer)
    if isinstance(state.config, LoRA):
        problems += _misfit_factors(model, state, state.config)
        problems += _misfit_saved(model, state)
        problems += _misfit_tokens(model, state)
    elif state.config.replaces_weights:
        problems += _misfit_weights(model, state, state.config)
    else:
        problems += _misfit_virtual(model, state, state.config)
    if state.rows is not None:
        problems += _misfit_rows(model, state.rows, tokenizer)
    return problems


def _misfit_weights(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    if quantized_layers(model):
        return [f"{config.method} replaces weights, and those of this base are packed"]
    try:
        wanted = replaced_weights(model, config)
    except ConfigError as error:
        return [str(error).rstrip(".")]
    return _differing(state, {key: tuple(weight.shape) for key, weight in wanted.items()})


def _misfit_virtual(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    try:
        return _differing(state, {config.method: virtual_shape(model, config)})
    except ConfigError as error:
        return [str(error).rstrip(".")]


def _differing(state: AdapterState, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what differs from tensors of these names and shapes."""
    problems = []
    if missing := [key for key in wanted if key not in state.tensors]:
        problems.append(f"weights are missing: {listed(missing)}")
    if foreign := [key for key in state.tensors if key not in wanted]:
        likely = nearest(foreign[0], wanted)
        problems.append(
            f"what it brings is none of the weights that train: {listed(foreign)}{likely}"
        )
    for key, tensor in state.tensors.items():
        if key not in wanted:
            continue
        if tuple(tensor.shape) != wanted[key]:
            there = tuple(tensor.shape)
            problems.append(f"{key} is {there}, but needs to be {wanted[key]}")
        if not is_finite(tensor):
            problems.append(f"{key} has values that are not finite numbers of a sensible size")
    return problems


def _foreign(
    model: PreTrainedModel, state: AdapterState, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    here = fingerprint(model, tokenizer)
    differing = [
        part for part, mark in state.base_fingerprint.items() if here.get(part, mark) != mark
    ]
    if not differing:
        return []
    return [
        f"it was trained on another base ({state.base_name or 'unnamed'}: its "
        f"{' and '.join(differing)} differ; force overrides this)"
    ]


def _misfit_factors(model: nn.Module, state: AdapterState, config: LoRA) -> list[str]:
    problems: list[str] = []
    layers = [*adaptable_layers(model), *adaptable_parameters(model)]
    places = {layer.path: layer for layer in layers}
    complete: set[str] = set()
    for stored in state.layers():
        path = stored.path
        complete.add(path)
        layer = places.get(path)
        if layer is None:
            problems.append(_why_no_layer(model, path, places, hint=len(problems) < MOST_PROBLEMS))
        elif stored.kind != ("linear" if layer.kind == "conv" else layer.kind):
            problems.append(f"{path} is a {type(layer.module).__name__}, of the other kind")
        elif isinstance(layer.module, nn.Conv2d) and (why := why_not_adaptable(layer.module)):
            problems.append(f"{path} is a convolution that cannot be adapted: {why}")
        else:
            try:
                problems += _misshapen(stored, config, layer)
            except ConfigError as error:  # a pattern without end, and the next would be too
                return [*problems, str(error)]
    finite = _are_finite(state.tensors.values())
    for key, tensor in state.tensors.items():
        path = key.rpartition(".")[0]
        if path not in complete:
            problems.append(f"{key} stands alone, without its other half")
        if not (finite or is_finite(tensor)):
            problems.append(f"{key} has values that are not finite numbers of a sensible size")
    try:
        wanted = {layer.path for layer in resolve(model, config, list(places.values()))}
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    else:
        if missing := sorted(wanted - complete):
            problems.append(f"weights are missing for {listed(missing)}")
        problems += [
            f"{path} has weights, but is not among the targets"
            for path in sorted(complete - wanted)
        ]
    own = base_parameters(model, every_name=True) if state.base_weights else {}
    for path, weight in state.base_weights.items():
        base = own.get(path)
        if (
            base is None
            or base.shape != weight.shape
            or not torch.equal(base.detach().cpu().to(torch.bfloat16), weight.to(torch.bfloat16))
        ):
            problems.append(f"it brings a {path} of its own that differs from the base's")
    return problems


def _why_no_layer(model: nn.Module, path: str, places: Mapping[str, Layer], *, hint: bool) -> str:
    there = dict(model.named_modules()).get(path)
    if there is None:
        likely = nearest(path, places) if hint else ""
        return f"{shortened(path)} is no layer of this model{likely}"
    return f"{path} is a {type(there).__name__}, which cannot be adapted"


def _misshapen(stored: StoredLayer, config: LoRA, layer: Layer) -> list[str]:
    """Return what of one layer's tensors is missing, too much, or of the wrong shape.

    Raises ConfigError where the patterns of the settings take too long to match.
    """
    path, out = stored.path, layer.shape[0]
    rank, _ = config.rank_of(path), config.scaling_of(path)
    needed = layer.factor_shapes(rank)
    problems = []
    if (tuple(stored.A.shape), tuple(stored.B.shape)) != needed:
        problems.append(
            f"{path} has A {tuple(stored.A.shape)} and B {tuple(stored.B.shape)}, "
            f"but needs {needed[0]} and {needed[1]}"
        )
    if config.dora != (stored.magnitude is not None):
        problems.append(f"{path} has {'no' if config.dora else 'a'} magnitude, unlike its settings")
    elif stored.magnitude is not None and tuple(stored.magnitude.shape) != (out,):
        problems.append(
            f"{path} has a magnitude {tuple(stored.magnitude.shape)}, but needs {(out,)}"
        )
    elif stored.magnitude is not None and stored.kind == "parameter":
        problems.append(f"{path} is a parameter, over which there is no DoRA")
    if stored.bias is not None and stored.kind != "linear":
        problems.append(f"{path} has a lora_bias, but is no linear layer or convolution")
    elif stored.bias is not None and tuple(stored.bias.shape) != (out,):
        problems.append(f"{path} has a lora_bias {tuple(stored.bias.shape)}, but needs {(out,)}")
    if stored.start is not None and tuple(tuple(t.shape) for t in stored.start) != needed:
        shapes = " and ".join(str(tuple(t.shape)) for t in stored.start)
        problems.append(f"{path} started at {shapes}, but needs {needed[0]} and {needed[1]}")
    if config.has_start and stored.start is None and layer.is_linear:
        problems.append(f"{path} does not say where it started")
    return problems


def _misfit_saved(model: nn.Module, state: AdapterState) -> list[str]:
    """Return what is wrong with weights that are to stand in the place of the base's own."""
    if not state.saved:
        return []
    problems = []
    own = base_parameters(model, every_name=True)
    adapted = {layer.path for layer in state.layers()}
    for path, weight in state.saved.items():
        base, layer = own.get(path), path.removesuffix(".weight")
        if f"{layer}.original" in quantized_layers(model) or layer in quantized_layers(model):
            problems.append(f"it replaces {path}, which this base has packed; load it without bits")
        elif base is None:
            problems.append(f"it replaces {path}, which the base does not have{nearest(path, own)}")
        elif base.shape != weight.shape:
            problems.append(f"{path} is {tuple(weight.shape)}, but needs to be {tuple(base.shape)}")
        if path in adapted or layer in adapted:
            problems.append(f"it both replaces {path} and adapts it")
        if not is_finite(weight):
            problems.append(f"{path} has values that are not finite numbers of a sensible size")
    return problems


def _misfit_tokens(model: PreTrainedModel, state: AdapterState) -> list[str]:
    """Return what is wrong with rows of single words."""
    if not state.tokens:
        return []
    problems = []
    places = {layer.path: layer for layer in adaptable_layers(model)}
    adapted = {layer.path for layer in state.layers()}
    tied = shared_tokens(model, state.tokens)
    for path, tokens in state.tokens.items():
        layer, count = places.get(path), len(tokens.ids)
        if layer is None or not (layer.kind == "embedding" or layer.is_head):
            problems.append(f"{path}, of which it has rows, is no embedding or head of this model")
            continue
        words, dim = layer.shape if layer.is_linear else layer.shape[::-1]
        if beyond := [i for i in tokens.ids if not 0 <= i < words]:
            problems.append(
                f"it has rows for words {listed([str(i) for i in beyond])} of {path}, but the base "
                f"has {words}; resize its embedding before loading"
            )
        if len(set(tokens.ids)) < count:
            problems.append(f"it has more than one row of {path} for some words")
        if tokens.rows is None and path not in tied:
            problems.append(f"rows of {path} are missing, and this base has no other for them")
        if tokens.rows is not None and tuple(tokens.rows.shape) != (count, dim):
            there = tuple(tokens.rows.shape)
            problems.append(f"its rows of {path} are {there}, but need to be {(count, dim)}")
        if tokens.rows is not None and not is_finite(tokens.rows):
            problems.append(
                f"its rows of {path} have values that are not finite numbers of a sensible size"
            )
        if path in adapted or f"{path}.weight" in state.saved:
            problems.append(f"it has rows of {path}, and changes all of it as well")
        if layer.is_head and getattr(layer.module, "bias", None) is not None:
            problems.append(f"{path} has a bias, which PEFT leaves out where single rows train")
    return problems


def _misfit_rows(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if new_tokens_of(model) is not None:
        return ["the model has new words already, and this adapter brings its own"]
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | QuantizedLinear):
        return ["it brings new words, which need a base whose embedding and head are not adapted"]
    problems = []
    known, dim = embedding.weight.shape
    if not 0 <= rows.start <= known:
        problems.append(f"its new words start at {rows.start}, but the base has {known} words")
    if (rows.head is None) != is_tied(embedding, head):
        problems.append("the base and it differ in whether embedding and head are tied")
    for part, values in (("embedding", rows.embedding), ("head", rows.head)):
        if values is None:
            continue
        if tuple(values.shape) != (len(rows.words), dim):
            problems.append(
                f"its new rows of the {part} are {tuple(values.shape)}, "
                f"but must be {(len(rows.words), dim)}"
            )
        if not is_finite(values):
            problems.append(
                f"its new rows of the {part} have values that are not finite numbers of a sensible "
                "size"
            )
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        found = [vocabulary.get(word) for word in rows.words]
        there = list(range(rows.start, rows.start + len(rows.words)))
        if found != there and (any(i is not None for i in found) or len(tokenizer) != rows.start):
            problems.append(
                f"the tokenizer has other tokens where its new words start ({rows.start})"
            )
    return problems


def _are_finite(tensors: Collection[Tensor]) -> bool:
    """Return whether all tensors are what is_finite asks for, in a pass over all of them; False
    also where that cannot be told."""
    kinds = {(t.dtype, t.layout, t.device.type) for t in tensors}
    if kinds != {(torch.float32, torch.strided, "cpu")}:
        return False
    if any(t.ndim > 2 or not t.numel() for t in tensors):
        return False
    return bool(get_total_norm(list(tensors), torch.inf) <= LARGEST_NUMBER)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain one of numbers, all finite and fit to compute with."""
    plain = tensor.layout is torch.strided and not tensor.is_meta and tensor.is_floating_point()
    if tensor.ndim > 64:  # a file can have more dimensions than torch can compute with
        return False
    return plain and bool((tensor.to(torch.float32).abs() <= LARGEST_NUMBER).all())
