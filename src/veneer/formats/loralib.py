"""microsoft/LoRA's state dictionary (loralib): what lora_state_dict(model) returns, in a .pt file.

    Linear         y = W x + alpha / r · B (A x)           A (r, in)        B (out, r)
    Embedding      the same, over tokens                   A (r, vocab)     B (dim, r)
    MergedLinear   several products in one layer, such as q, k and v in GPT-2's c_attn; for those
                   that `enable_lora` enables              A (r · enabled, in)
                                                           B (out · enabled / products, r)

The file has neither alpha nor enable_lora: the model's code has them (loralib/layers.py). We write
both into loralib_config.json beside it; a reader of another file must give them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ConfigError, joined, listed
from veneer.files import new_directory, read_json, read_tensors, write_json, write_tensors
from veneer.formats.base_structure import targets_for
from veneer.formats.contents import refuse_without_place
from veneer.formats.fold import same_scale, without_start
from veneer.formats.options import FormatOptions
from veneer.formats.state import (
    FACTORS,
    AdapterState,
    StoredLayer,
    int_if_whole,
    layer_kind,
    lora_settings,
)
from veneer.formats.training import write_beside

CONFIG, WEIGHTS = "loralib_config.json", "lora_weights.pt"
FORMAT = 1
KINDS = ("Linear", "Embedding", "MergedLinear")


def detects(path: Path) -> bool:
    """Return whether a path is a directory that `write` wrote, or any .pt file."""
    return (path / CONFIG).is_file() or (path.is_file() and path.suffix == ".pt")


def base_of(path: Path) -> str:
    """Return the name of the base; a .pt file names none."""
    return str(read_json(path / CONFIG).get("base") or "") if path.is_dir() else ""


def read(path: Path, options: FormatOptions) -> AdapterState:
    """Read a directory that `write` wrote, or a .pt file. Raises AdapterError, naming the path."""
    if path.is_dir():
        config, weights = read_json(path / CONFIG), path / WEIGHTS
    else:
        config, weights = {}, path
    try:
        return state_of(config, read_tensors(weights), options)
    except AdapterError as error:
        raise AdapterError(f"The loralib adapter in {path} cannot be used: {error}.") from error


def write(state: AdapterState, path: Path, options: FormatOptions) -> list[str]:
    """Write loralib's state dictionary and our loralib_config.json; return notes on changes.

    Raises AdapterError for what loralib has no place for.
    """
    config, tensors, notes = loralib_of(state, options.enable_lora)
    with new_directory(path, marker=CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_json(new / CONFIG, config)
        write_beside(new, state.training)
    return notes


def loralib_of(
    state: AdapterState, enable_lora: tuple[bool, ...] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return loralib_config.json, loralib's tensors, and notes on what was changed.

    A linear layer whose B has the blocks that `enable_lora` enables becomes a MergedLinear.
    """
    refuse_without_place(state, "loralib")
    state, notes = without_start(state)
    config = state.config
    assert isinstance(config, LoRA)
    merged = {
        layer.path
        for layer in state.layers()
        if enable_lora and not layer.is_embedding and _blocks(layer.B, enable_lora) is not None
    }
    if enable_lora and not merged:
        raise AdapterError(
            "No layer of this adapter has the blocks that enable_lora enables; leave it out, and "
            "fused layers are written as loralib's Linear."
        )
    ranks = {
        layer.path: len(layer.A) // (sum(enable_lora or ()) if layer.path in merged else 1)
        for layer in state.layers()
    }
    # alpha / r is the factor, and a model's code has one alpha for all layers.
    alphas = {path: config.scaling_of(path) * rank for path, rank in ranks.items()}
    state, alpha, folded = same_scale(state, alphas, "alpha")
    if config.rslora:
        notes.append(f"rsLoRA's alpha / √rank is written as alpha / rank, with alpha {alpha:g}.")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for layer in state.layers():
        path, B = layer.path, layer.B
        kind = "Embedding" if layer.is_embedding else "Linear"
        layers[path] = {"layer": kind, "r": ranks[path], "lora_alpha": int_if_whole(alpha)}
        if path in merged and enable_lora and (blocks := _blocks(B, enable_lora)) is not None:
            layers[path] |= {"layer": "MergedLinear", "enable_lora": list(enable_lora)}
            B = blocks
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = layer.A, B
    if merged:
        paths = listed(path for path in layers if path in merged)
        notes.append(f"MergedLinear, with factors for each product: {paths}.")
    settings = {
        "format": FORMAT,
        "base": state.base_name,
        "lora_dropout": config.dropout,
        "layers": layers,
    }
    return settings, tensors, notes + folded


def state_of(
    config: dict[str, Any], tensors: dict[str, Tensor], options: FormatOptions
) -> AdapterState:
    """Return the adapter of loralib's tensors; `config` is our loralib_config.json, or empty.

    Raises AdapterError, listing everything that is missing and every key that is unknown.
    """
    problems = []
    if config and config.get("format") != FORMAT:
        problems.append(f"its format is {config.get('format')!r}, and only {FORMAT} is read")
    if config and (options.alpha is not None or options.enable_lora is not None):
        problems.append(f"{CONFIG} says alpha and enable_lora; do not give them")
    if not config and options.alpha is None:
        problems.append("the file does not say the alpha of its layers; give it (--alpha)")
    A_name, B_name = FACTORS["linear"]
    for key in tensors:
        if key.endswith("bias"):
            problems.append(f"{key} is a trained bias, which is not read")
        elif key.rpartition(".")[2] not in (A_name, B_name):
            problems.append(f"the key {key!r} is unknown")
    layers: list[StoredLayer] = []
    alphas: dict[str, float] = {}
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        A, B = tensors.get(f"{path}.{A_name}"), tensors.get(f"{path}.{B_name}")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not B.shape[1]:
            problems.append(f"{path} needs lora_A and lora_B, each of two dimensions")
            continue
        try:
            kind = _kind_in(config, path) if config else _inferred_kind(path, A, B, options)
        except AdapterError as error:
            problems.append(str(error))
            continue
        alphas[path] = kind.alpha
        if kind.enabled is not None:
            B = _unblocked(B, kind.enabled)
            # The factor stays alpha / r, and the rank is r · enabled.
            alphas[path] *= sum(kind.enabled)
        layers.append(StoredLayer(path, A, B, layer_kind(is_embedding=kind.is_embedding)))
    if not problems and not layers:
        problems.append("it holds no factors")
    if problems:
        raise AdapterError(joined(problems))
    ranks = {layer.path: len(layer.A) for layer in layers}
    try:
        lora = lora_settings(
            ranks,
            alphas,
            targets=targets_for(set(ranks), options.base),
            dropout=config.get("lora_dropout", 0.0),
        )
    except ConfigError as error:
        raise AdapterError(str(error).rstrip(".")) from error
    ours = {key: tensor for layer in layers for key, tensor in layer.tensors().items()}
    return AdapterState(lora, ours, base_name=str(config.get("base") or ""))


class LayerType(NamedTuple):
    """What decides how loralib's factors of a layer are read; `enabled`: of a MergedLinear."""

    is_embedding: bool
    alpha: float
    enabled: tuple[bool, ...] | None = None


def _kind_in(config: dict[str, Any], path: str) -> LayerType:
    """Return what loralib_config.json says of a layer."""
    layers = config.get("layers")
    settings = layers.get(path) if isinstance(layers, dict) else None
    if not isinstance(settings, dict):
        raise AdapterError(f"{CONFIG} does not say what {path} is")
    kind, alpha = settings.get("layer"), settings.get("lora_alpha")
    enabled = settings.get("enable_lora")
    are_flags = isinstance(enabled, list) and all(isinstance(on, bool) for on in enabled)
    if (
        kind not in KINDS
        or not isinstance(alpha, int | float)
        or not abs(alpha) <= sys.float_info.max
        or (kind == "MergedLinear" and not (are_flags and any(enabled or ())))
    ):
        raise AdapterError(
            f"{CONFIG} says {settings} of {path}, but must say a layer ({', '.join(KINDS)}), its "
            "lora_alpha, and of a MergedLinear enable_lora"
        )
    merged = tuple(enabled or ()) if kind == "MergedLinear" else None
    return LayerType(kind == "Embedding", float(alpha), merged)


def _inferred_kind(path: str, A: Tensor, B: Tensor, options: FormatOptions) -> LayerType:
    """Return what a layer must be, judged by the base and by the shapes of its factors."""
    base, alpha = options.base, options.alpha or 0.0
    layer = base.layers.get(path) if base else None
    if base is None and not any(step.isdigit() for step in path.split(".")):
        raise AdapterError(f"{path} may be an embedding or a linear layer; name the base (--base)")
    if layer is not None and not layer.is_linear:
        return LayerType(True, alpha)
    count, rest = divmod(len(A), B.shape[1])
    if rest or not count:
        raise AdapterError(
            f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, which fit no layer of loralib"
        )
    whole = count == 1 if layer is None else len(B) == layer.shape[0]
    if whole:  # all products have factors, if there is more than one
        return LayerType(False, alpha, (True,) * count if count > 1 else None)
    if options.enable_lora is None or sum(options.enable_lora) != count:
        raise AdapterError(
            f"{path} is a MergedLinear with factors for {count} of its products, and the file does "
            "not say which; give them (--enable-lora 101 for the first and the last of three)"
        )
    return LayerType(False, alpha, options.enable_lora)


def _unblocked(B: Tensor, enabled: tuple[bool, ...]) -> Tensor:
    """Return B (out, r · enabled), one block for each enabled product, zero elsewhere."""
    rank, height = B.shape[1], len(B) // sum(enabled)
    whole = B.new_zeros(height * len(enabled), rank * sum(enabled))
    for rows, columns, block in _block_slices(enabled, height, rank):
        whole[rows, columns] = B[block]
    return whole


def _blocks(B: Tensor, enabled: tuple[bool, ...]) -> Tensor | None:
    """Return B's blocks (out · enabled / products, r), or None if B has values outside them."""
    count, products = sum(enabled), len(enabled)
    if not count or len(B) % products or B.shape[1] % count:
        return None
    slices = _block_slices(enabled, len(B) // products, B.shape[1] // count)
    blocks = torch.cat([B[rows, columns] for rows, columns, _ in slices])
    return blocks if torch.equal(_unblocked(blocks, enabled), B) else None


def _block_slices(
    enabled: tuple[bool, ...], height: int, rank: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Yield each enabled product's rows and columns in the whole B, and its rows in the blocks."""
    products = [product for product, on in enumerate(enabled) if on]
    for block, product in enumerate(products):
        yield (
            slice(product * height, (product + 1) * height),
            slice(block * rank, (block + 1) * rank),
            slice(block * height, (block + 1) * height),
        )
