"""An adapter from the contents of llama.cpp's LoRA file, and back: pure, without files.

llama.cpp adds (alpha / rank) · B (A x), with one alpha a file and each tensor's own rank
(llama-adapter.h, get_scale).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, joined, listed, nearest
from veneer.formats.contents import without_place
from veneer.formats.gguf.names import HEAD, Naming, unpermuted
from veneer.formats.stacks import as_one
from veneer.formats.state import (
    AdapterState,
    StoredLayer,
    layer_kind,
    lora_settings,
    shortest_names,
)
from veneer.lowrank.approximate import nearest_to_dora
from veneer.lowrank.formula import Factors

A_END, B_END = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Contents:
    """The contents of a LoRA file, and notes on what was folded.

    Tensors are `<name>.lora_a` (rank, in) and `<name>.lora_b` (out, rank), after a dimension of
    experts in a stack of them; of the embedding (vocab, rank) and (dim, rank), since llama.cpp
    looks up rows of A.
    """

    architecture: str
    alpha: float
    tensors: dict[str, np.ndarray]
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()  # the ids of the tokens from which on it acts; all without
    notes: tuple[str, ...] = ()


def contents_of(state: AdapterState, naming: Naming) -> Contents:
    """Return a plain LoRA under llama.cpp's names, with rows in its order.

    alpha / rank is the scaling of most layers; others' scalings are folded into B. Raises
    AdapterError, listing all that the format cannot express.
    """
    config = state.config
    if not isinstance(config, LoRA):
        raise AdapterError(f"GGUF has no adapters of the method {config.method}; only of lora.")
    layers = list(state.layers())
    if problems := _not_expressed(state, naming):
        raise AdapterError(f"llama.cpp's LoRA cannot express this: {joined(problems)}.")
    alphas = {layer.path: config.scaling_of(layer.path) * layer.B.shape[-1] for layer in layers}
    alpha = float(np.float32(Counter(alphas.values()).most_common(1)[0][0]))
    tensors: dict[str, np.ndarray] = {}
    folded = 0
    for layer in layers:
        factor = alphas[layer.path] / alpha
        A, B = layer.A.to(torch.float32), layer.B.to(torch.float64)
        if abs(factor - 1) > 2**-23:  # float32 cannot tell less apart
            B, folded = factor * B, folded + 1
        for place in naming.of(layer.path):
            a, b = A.T if place.is_embedding else A, place.of(B).to(torch.float32)
            a = a.expand(len(b), -1, -1) if place.is_stack else a  # also an A that experts share
            tensors[place.name + A_END] = np.ascontiguousarray(a.numpy())
            tensors[place.name + B_END] = np.ascontiguousarray(b.numpy())
    notes = []
    if folded:
        notes.append(
            f"{folded} of {len(layers)} layers have other scalings than {alpha:g} / rank, which "
            "are folded into their B"
        )
    name, marks = state.hub_name, dict(state.base_fingerprint)
    return Contents(
        *(naming.architecture, alpha, tensors, name, marks, config.invocation_tokens),
        notes=tuple(notes),
    )


def state_of(contents: Contents, naming: Naming) -> AdapterState:
    """Return the adapter in a LoRA file for the base that `naming` describes.

    Raises AdapterError, listing all that does not fit that base.
    """
    problems = []
    if contents.architecture != naming.architecture:
        problems.append(
            f"it is for {contents.architecture!r}, and the base is {naming.architecture!r}"
        )
    places = {name: place for name, place in naming.by_name.items() if place.takes_adapters}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, array in contents.tensors.items():
        name, end = key[:-7], key[-7:]
        if end not in (A_END, B_END):
            problems.append(f"{key!r} is neither lora_a nor lora_b, and not read")
        elif name not in places:
            problems.append(f"the base has no {name!r} to adapt{nearest(name, places)}")
        elif array.ndim != 2 + places[name].is_stack:
            what = "stack of matrices" if places[name].is_stack else "matrix"
            problems.append(f"{key!r} is no {what}")
        else:
            halves.setdefault(name, {})[end] = torch.from_numpy(np.array(array, dtype=np.float32))
    layers: list[StoredLayer] = []
    stacks: dict[str, dict[tuple[int, int], Factors]] = defaultdict(dict)
    woven: dict[str, bool] = {}
    for name, half in halves.items():
        place = places[name]
        if set(half) != {A_END, B_END}:
            problems.append(f"{name!r} has {next(iter(half))} alone, without its other half")
            continue
        A, B = half[A_END], half[B_END]
        if place.heads and len(B) % (2 * place.heads):
            problems.append(f"{name}{B_END} has {len(B)} rows, which do not divide among the heads")
            continue
        if place.is_stack:
            stacks[place.path][place.share] = A, B
            woven[place.path] = place.woven and place.share != (0, 1)
            continue
        A = A.T.contiguous() if place.is_embedding else A
        B = unpermuted(B, place.heads).contiguous()
        kind = layer_kind(is_embedding=place.is_embedding)
        layers.append(StoredLayer(place.path, A, B, "parameter" if place.is_parameter else kind))
    layers += [
        _stack(path, shares, problems, scaled=contents.alpha != 0, woven=woven[path])
        for path, shares in stacks.items()
    ]
    if not layers and not problems:
        problems.append("it adapts nothing")
    if not (contents.alpha >= 0 and np.isfinite(contents.alpha)):
        problems.append(f"its alpha is {contents.alpha}")
    if problems:
        raise AdapterError(joined(problems))
    ranks = {layer.path: layer.B.shape[-1] for layer in layers}
    # Where alpha is 0, llama.cpp does not scale.
    alphas = {path: contents.alpha or float(rank) for path, rank in ranks.items()}
    targets = shortest_names(set(ranks), naming.places)
    settings = lora_settings(ranks, alphas, targets=targets)
    return AdapterState(
        replace(settings, invocation=contents.invocation or None),
        {key: tensor for layer in layers for key, tensor in layer.tensors().items()},
        base_name=contents.base_name,
        base_fingerprint=dict(contents.base_fingerprint),
    )


def _stack(
    path: str,
    shares: Mapping[tuple[int, int], Factors],
    problems: list[str],
    *,
    scaled: bool,
    woven: bool,
) -> StoredLayer:
    """Return the adapter of a stack of experts whose projections have tensors of their own, and add
    to `problems` what does not fit.

    scaled: whether llama.cpp scales each by alpha and its own rank, which becomes one scaling here.
    woven: whether the stack has their rows in turn.
    """
    (A, B), *_ = shares.values()
    counts = {count for _, count in shares}
    sizes = {(len(a), len(b), a.shape[2], b.shape[1]) for a, b in shares.values()}
    pairs = all(a.shape[1] == b.shape[2] for a, b in shares.values())
    if len(counts) > 1 or len(sizes) > 1 or not pairs or len(A) != len(B):
        problems.append(f"its tensors of {path} do not go together")
        return StoredLayer(path, A, B, "parameter")
    missing = A[:, :0], B[:, :, :0]
    (count,) = counts
    projections = [shares.get((index, count), missing) for index in range(count)]
    one_a, one_b = as_one(projections)
    ranks, rank = [a.shape[1] for a, _ in projections], one_a.shape[1]
    if scaled and set(ranks) != {rank}:
        by_rank = [(a, b * (rank / max(a.shape[1], 1))) for a, b in projections]
        one_a, one_b = as_one(by_rank)
    if woven:
        one_b = one_b.unflatten(1, (count, -1)).transpose(1, 2).flatten(1, 2)
    return StoredLayer(path, one_a, one_b.contiguous(), "parameter")


def without_dora(
    state: AdapterState, weight_of: Callable[[str], Tensor]
) -> tuple[AdapterState, tuple[str, ...]]:
    """Return the plain LoRA of the same ranks that is nearest to a DoRA, and a note on how near.

    DoRA changes W to m ∘ (W + s B A) / ‖W + s B A‖; the LoRA has the change's largest singular
    values. `weight_of(path)` returns W as (out, in), an embedding's as (dim, vocab).
    """
    config = state.config
    assert isinstance(config, LoRA)
    layers: list[StoredLayer] = []
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    lost = whole = 0.0
    for layer in state.layers():
        if layer.magnitude is None:
            continue
        A, B, missing, change = nearest_to_dora(
            weight_of(layer.path),
            layer.A,
            layer.B,
            layer.magnitude,
            config.scaling_of(layer.path),
            generator,
        )
        layers.append(replace(layer, A=A, B=B, magnitude=None))
        lost, whole = lost + missing**2, whole + change**2
        errors[layer.path] = missing / change if change else 0.0
    plain = replace(state, config=replace(config, dora=False)).with_layers(layers)
    if not errors:
        return plain, ()
    worst = max(errors, key=errors.__getitem__)
    return plain, (
        f"DoRA was approximated at its own rank: {(lost / whole) ** 0.5 if whole else 0.0:.1%} of "
        f"its change is missing ({errors[worst]:.1%} in {worst}); a merged model has all of it",
    )


def _not_expressed(state: AdapterState, naming: Naming) -> list[str]:
    config = state.config
    assert isinstance(config, LoRA)
    problems = []
    if config.dora:
        problems.append(
            "DoRA scales W itself; merge it into the model, or ask for the nearest plain LoRA "
            "(approximate)"
        )
    if others := [c for c in without_place(state, "gguf") if c != "DoRA's magnitudes"]:
        do = "write it natively" if config.invocation else "merge it into the model"
        problems.append(f"it has no place for {listed(others)}; {do}")
    for layer in state.layers():
        places = naming.of(layer.path)
        if not places or not all(place.takes_adapters for place in places):
            problems.append(f"llama.cpp adapts no {layer.path}")
        elif naming.tied and (places[0].is_embedding or places[0].name == HEAD):
            # It has one tensor for both, and would adapt both.
            problems.append(f"{layer.path} is embedding and head in one there; merge it")
    return problems
