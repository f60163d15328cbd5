"""microsoft/LoRA's state dictionary (loralib): what lora_state_dict(model) returns, in a .pt file.

    Linear         y = W x + alpha / r · B (A x)           A (r, in)        B (out, r)
    Embedding      the same, over words                    A (r, words)     B (dim, r)
    MergedLinear   one layer of several parts, such as GPT-2's c_attn, of which `enable_lora` says
                   which have factors of their own         A (r · enabled, in)
                                                           B (out · enabled / parts, r)

The file says neither alpha nor enable_lora, which the model's code has (loralib/layers.py). Beside
the weights we write loralib_config.json, which does; without it they must be given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ConfigError, listed
from veneer.files import new_directory, read_json, read_tensors, write_json, write_tensors
from veneer.formats.fold import plain_lora, same_scale
from veneer.formats.given import Given
from veneer.formats.known_base import KnownBase
from veneer.formats.parts import EMBEDDING, LINEAR
from veneer.formats.state import AdapterState

CONFIG, WEIGHTS = "loralib_config.json", "lora_weights.pt"
FORMAT = 1
KINDS = ("Linear", "Embedding", "MergedLinear")


def found(path: Path) -> bool:
    """Return whether a path is a directory of ours in this format, or a .pt file of anybody's."""
    return (path / CONFIG).is_file() or (path.is_file() and path.suffix == ".pt")


def read(path: Path, given: Given) -> AdapterState:
    """Read a directory that `write` wrote, or a .pt file. Raises AdapterError, naming the path."""
    if path.is_dir():
        said, weights = read_json(path / CONFIG), path / WEIGHTS
    else:
        said, weights = {}, path
    try:
        return state_of(said, read_tensors(weights), given)
    except AdapterError as error:
        raise AdapterError(f"The loralib adapter in {path} cannot be used: {error}.") from error


def write(state: AdapterState, path: Path, given: Given) -> list[str]:
    """Write a directory with loralib's state dictionary. Returns notes on what was changed.

    Raises AdapterError for what loralib has no place for.
    """
    config, tensors, notes = loralib_of(state, given.enable_lora)
    with new_directory(path, marker=CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_json(new / CONFIG, config)
    return notes


def loralib_of(
    state: AdapterState, enable_lora: tuple[bool, ...] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return what loralib_config.json says, loralib's tensors, and notes on what was changed.

    A linear layer whose B has the blocks that `enable_lora` tells becomes a MergedLinear.
    """
    config, plain, notes = plain_lora(state, "loralib", dora=False)
    merged = {
        layer.path: B
        for layer in plain.layers()
        if enable_lora and not layer.is_embedding
        if (B := _blocks(layer.B, enable_lora)) is not None
    }
    ranks = {
        layer.path: merged[layer.path].shape[1] if layer.path in merged else len(layer.A)
        for layer in plain.layers()
    }
    # alpha / r is the factor, and a model's code has one alpha for all layers.
    alphas = {path: config.scaling_of(path) * rank for path, rank in ranks.items()}
    plain, alpha, folded = same_scale(plain, alphas, "alpha")
    if config.rslora:
        notes.append(f"rsLoRA's alpha / √rank is written as alpha / rank, with alpha {alpha:g}.")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for layer in plain.layers():
        kind = "Embedding" if layer.is_embedding else "Linear"
        told: dict[str, Any] = {"layer": kind, "r": ranks[layer.path], "lora_alpha": _whole(alpha)}
        B = layer.B
        if layer.path in merged:
            assert enable_lora is not None
            told |= {"layer": "MergedLinear", "enable_lora": list(enable_lora)}
            found_blocks = _blocks(B, enable_lora)
            assert found_blocks is not None
            B = found_blocks
        tensors[f"{layer.path}.lora_A"], tensors[f"{layer.path}.lora_B"] = layer.A, B
        layers[layer.path] = told
    if enable_lora and not merged:
        raise AdapterError(
            "No layer of this adapter has the parts that enable_lora tells; leave it out, and "
            "fused layers are written as loralib's Linear."
        )
    if merged:
        notes.append(f"MergedLinear, its parts with factors of their own: {listed(merged)}.")
    said = {
        "format": FORMAT,
        "base": state.base_name,
        "lora_dropout": config.dropout,
        "layers": layers,
    }
    return said, tensors, notes + folded


def state_of(said: dict[str, Any], tensors: dict[str, Tensor], given: Given) -> AdapterState:
    """Return the adapter of loralib's tensors; `said` is our loralib_config.json's, or empty.

    Raises AdapterError, listing everything that is missing and every key that is unknown.
    """
    problems = []
    if said and said.get("format") != FORMAT:
        problems.append(f"its format is {said.get('format')!r}, and only {FORMAT} is read")
    if said and (given.alpha is not None or given.enable_lora is not None):
        problems.append(f"{CONFIG} says alpha and enable_lora; do not give them")
    if not said and given.alpha is None:
        problems.append("the file does not say the alpha of its layers; give it (--alpha)")
    for key in tensors:
        if key.endswith("bias"):
            problems.append(f"{key} is a trained bias, which is not read")
        elif key.rpartition(".")[2] not in LINEAR:
            problems.append(f"the key {key!r} is unknown")
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        A, B = (tensors.get(f"{path}.{name}") for name in LINEAR)
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not B.shape[1]:
            problems.append(f"{path} needs lora_A and lora_B, each of two dimensions")
            continue
        try:
            told = _told(path, said) if said else _guessed(path, A, B, given)
        except AdapterError as error:
            problems.append(str(error))
            continue
        alpha = told.alpha
        if told.enabled is not None:
            B = _unblocked(B, told.enabled)
            alpha *= sum(told.enabled)  # the factor stays alpha / r, and the rank is r · enabled
        names = EMBEDDING if told.is_embedding else LINEAR
        ours[f"{path}.{names[0]}"], ours[f"{path}.{names[1]}"] = A, B
        ranks[path], alphas[path] = len(A), alpha
    lora = None
    if not problems:
        try:
            lora = _lora(ranks, alphas, said.get("lora_dropout", 0.0), given.base)
        except ConfigError as error:
            problems.append(str(error).rstrip("."))
    if lora is None:
        raise AdapterError("; ".join(problems))
    return AdapterState(lora, ours, base_name=str(said.get("base") or ""))


def _lora(
    ranks: dict[str, int], alphas: dict[str, float], dropout: float, base: KnownBase | None
) -> LoRA:
    """Return the configuration of layers with these ranks and alphas."""
    if not ranks:
        raise ConfigError("It holds no factors.")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    paths = set(ranks)
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=base.short_names(paths) if base else sorted(paths),
        rank_pattern={path: own for path, own in ranks.items() if own != rank},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
    )


class Told(NamedTuple):
    """What is known of a layer beside its factors; `enabled` of a MergedLinear alone."""

    is_embedding: bool
    alpha: float
    enabled: tuple[bool, ...] | None = None


def _told(path: str, said: dict[str, Any]) -> Told:
    """Return what loralib_config.json says of a layer."""
    layers = said.get("layers")
    told = layers.get(path) if isinstance(layers, dict) else None
    if not isinstance(told, dict):
        raise AdapterError(f"{CONFIG} does not say what {path} is")
    kind, alpha, enabled = told.get("layer"), told.get("lora_alpha"), told.get("enable_lora")
    parts = isinstance(enabled, list) and all(isinstance(on, bool) for on in enabled)
    if (
        kind not in KINDS
        or not isinstance(alpha, int | float)
        or (kind == "MergedLinear" and not (parts and any(enabled or ())))
    ):
        raise AdapterError(
            f"{CONFIG} says {told} of {path}, but must say a layer ({', '.join(KINDS)}), its "
            "lora_alpha, and of a MergedLinear enable_lora"
        )
    merged = tuple(enabled or ()) if kind == "MergedLinear" else None
    return Told(kind == "Embedding", float(alpha), merged)


def _guessed(path: str, A: Tensor, B: Tensor, given: Given) -> Told:
    """Return what a layer must be, by the shapes of its factors and the base.

    Of a MergedLinear A has r · enabled rows, and B out · enabled / parts.
    """
    layer = given.base.layers.get(path) if given.base else None
    alpha = given.alpha or 0.0
    if given.base is None and not any(part.isdigit() for part in path.split(".")):
        raise AdapterError(f"{path} may be an embedding or a linear layer; name the base (--base)")
    if layer is not None and not layer.is_linear:
        return Told(True, alpha)
    count, rest = divmod(len(A), B.shape[1])
    if rest or not count:
        raise AdapterError(
            f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, which no layer of loralib has"
        )
    whole = count == 1 if layer is None else len(B) == layer.shape[0]
    if whole:  # all parts have factors, if there is more than one
        return Told(False, alpha, (True,) * count if count > 1 else None)
    if given.enable_lora is None or sum(given.enable_lora) != count:
        raise AdapterError(
            f"{path} is a MergedLinear with factors for {count} of its parts, and the file does "
            "not say which; give them (--enable-lora 101 for the first and the last of three)"
        )
    return Told(False, alpha, given.enable_lora)


def _unblocked(B: Tensor, enabled: tuple[bool, ...]) -> Tensor:
    """Return B (out, r · enabled), one block for each part that has factors, zero elsewhere."""
    rank, height = B.shape[1], len(B) // sum(enabled)
    whole = B.new_zeros(height * len(enabled), rank * sum(enabled))
    parts = [part for part, on in enumerate(enabled) if on]
    for block, part in enumerate(parts):
        rows = slice(part * height, (part + 1) * height)
        whole[rows, block * rank : (block + 1) * rank] = B[block * height : (block + 1) * height]
    return whole


def _blocks(B: Tensor, enabled: tuple[bool, ...]) -> Tensor | None:
    """Return the blocks (out · enabled / parts, r) of which B is made, or None if it is not."""
    count, parts = sum(enabled), len(enabled)
    if not count or len(B) % parts or B.shape[1] % count:
        return None
    rank, height = B.shape[1] // count, len(B) // parts
    blocks = [
        B[part * height : (part + 1) * height, block * rank : (block + 1) * rank]
        for block, part in enumerate(part for part, on in enumerate(enabled) if on)
    ]
    small = torch.cat(blocks)
    return small if torch.equal(_unblocked(small, enabled), B) else None


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
