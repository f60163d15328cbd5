"""What of a stored adapter does not fit a model, all of it, before any of it is laid over it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import MOST, ConfigError, nearest, shortened
from veneer.frozen.packed import FrozenLinear, named_frozen
from veneer.lowrank.config import LoRA
from veneer.methods.config import Method
from veneer.methods.targets import adaptable_layers, resolve
from veneer.methods.unfreeze import replaced_weights
from veneer.methods.virtual import shape_of
from veneer.methods.vocabulary import is_tied, new_words
from veneer.models.fingerprint import base_parameters, fingerprint

if TYPE_CHECKING:
    from veneer.store.state import AdapterState, Rows, StoredLayer


def misfits(
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
    elif state.config.replaces_weights:
        problems += _misfit_weights(model, state, state.config)
    else:
        problems += _misfit_virtual(model, state, state.config)
    if state.rows is not None:
        problems += _misfit_rows(model, state.rows, tokenizer)
    return problems


def _misfit_weights(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    if named_frozen(model):
        return [f"{config.method} replaces weights, and those of this base are packed"]
    try:
        wanted = replaced_weights(model, config)
    except ConfigError as error:
        return [str(error).rstrip(".")]
    return _differing(state, {key: tuple(weight.shape) for key, weight in wanted.items()})


def _misfit_virtual(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    try:
        return _differing(state, {config.method: shape_of(model, config)})
    except ConfigError as error:
        return [str(error).rstrip(".")]


def _differing(state: AdapterState, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what differs from tensors of these names and shapes."""
    problems = []
    if missing := [key for key in wanted if key not in state.tensors]:
        problems.append(f"weights are missing: {_first(missing)}")
    if foreign := [key for key in state.tensors if key not in wanted]:
        likely = nearest(foreign[0], wanted)
        problems.append(
            f"what it brings is none of the weights that train: {_first(foreign)}{likely}"
        )
    for key, tensor in state.tensors.items():
        if key not in wanted:
            continue
        if tuple(tensor.shape) != wanted[key]:
            there = tuple(tensor.shape)
            problems.append(f"{key} is {there}, but needs to be {wanted[key]}")
        if not _is_finite(tensor):
            problems.append(f"{key} has values that are not finite numbers")
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
    places = {layer.path: layer for layer in adaptable_layers(model)}
    complete: set[str] = set()
    for stored in state.layers():
        path = stored.path
        complete.add(path)
        layer = places.get(path)
        if layer is None:
            likely = nearest(path, places) if len(problems) < MOST else ""
            problems.append(f"{shortened(path)} is no layer of this model{likely}")
        elif layer.is_linear == stored.is_embedding:
            problems.append(f"{path} is a {type(layer.module).__name__}, of the other kind")
        else:
            try:
                problems += _misshapen(stored, config, layer.shape)
            except ConfigError as error:  # a pattern without end, and the next would be too
                return [*problems, str(error)]
    finite = _are_finite(state.tensors.values())
    for key, tensor in state.tensors.items():
        path = key.rpartition(".")[0]
        if path not in complete:
            problems.append(f"{key} stands alone, without its other half")
        if not (finite or _is_finite(tensor)):
            problems.append(f"{key} has values that are not finite numbers")
    try:
        wanted = {layer.path for layer in resolve(model, config, list(places.values()))}
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    else:
        if missing := sorted(wanted - complete):
            problems.append(f"weights are missing for {_first(missing)}")
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


def _misshapen(stored: StoredLayer, config: LoRA, shape: tuple[int, int]) -> list[str]:
    """Return what of one layer's tensors is missing, too much, or of the wrong shape.

    Raises ConfigError where the patterns of the settings take too long to match.
    """
    path, (out, in_) = stored.path, shape
    rank, _ = config.rank_of(path), config.scaling_of(path)
    needed = ((rank, in_), (out, rank))
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
    if stored.start is not None and tuple(tuple(t.shape) for t in stored.start) != needed:
        shapes = " and ".join(str(tuple(t.shape)) for t in stored.start)
        problems.append(f"{path} started at {shapes}, but needs {needed[0]} and {needed[1]}")
    if config.has_start and stored.start is None and not stored.is_embedding:
        problems.append(f"{path} does not say where it started")
    return problems


def _misfit_rows(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if new_words(model) is not None:
        return ["the model has new words already, and this adapter brings its own"]
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | FrozenLinear):
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
        if not _is_finite(values):
            problems.append(f"its new rows of the {part} have values that are not finite numbers")
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        found = [vocabulary.get(word) for word in rows.words]
        there = list(range(rows.start, rows.start + len(rows.words)))
        if found != there and (any(i is not None for i in found) or len(tokenizer) != rows.start):
            problems.append(
                f"the tokenizer has other tokens where its new words start ({rows.start})"
            )
    return problems


def _first(names: list[str]) -> str:
    """Return the first names of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _are_finite(tensors: Collection[Tensor]) -> bool:
    """Return whether all tensors are what _is_finite asks for, in a pass over all of them; False
    also where that cannot be told."""
    kinds = {(t.dtype, t.layout, t.device.type) for t in tensors}
    if kinds != {(torch.float32, torch.strided, "cpu")}:
        return False
    if any(t.ndim > 2 or not t.numel() for t in tensors):
        return False
    return bool(torch.isfinite(get_total_norm(list(tensors), torch.inf)))


def _is_finite(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_meta and tensor.is_floating_point()
    if tensor.ndim > 64:  # a file can have more dimensions than torch can compute with
        return False
    return plain and bool(torch.isfinite(tensor.to(torch.float32)).all())
