"""mlx-lm's adapter directory: adapters.safetensors and adapter_config.json.

With a (in, rank), b (rank, out) and one scale for all layers, which is the factor itself, layers
compute (mlx_lm/tuner/lora.py and dora.py, read in 0.32.2):

    LoRA   y = W x + scale · (x a) b
    DoRA   y = (m / ‖W + scale · bᵀ aᵀ‖) ∘ (W x + scale · (x a) b), the norm row by row
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ConfigError, joined, listed
from veneer.files import new_directory, read_json, read_tensors, write_json, write_tensors
from veneer.formats.base_structure import BaseStructure, structure_of, targets_for
from veneer.formats.contents import refuse_without_place
from veneer.formats.fold import uniform
from veneer.formats.mlx_experts import MIXTURES, SWITCH, from_mlx, in_mlx
from veneer.formats.options import FormatOptions
from veneer.formats.state import FACTORS, MAGNITUDE, AdapterState, StoredLayer, layer_kind
from veneer.formats.training import name_here, read_beside, write_beside

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
TYPES = ("lora", "dora")  # values of fine_tune_type; the third, full, is no adapter
ENDINGS = ("lora_a", "lora_b", "m")
PLAIN_PATHS = "model.layers."  # paths below it are the same in transformers, and linear layers
# By model_type, the starts of paths that transformers and mlx-lm (mlx_lm/models/) name differently;
# the longest start counts.
MOVED: dict[str, dict[str, str]] = {
    "gpt2": {"transformer.": "model."},
    "gpt_neox": {
        "gpt_neox.layers.": "model.h.",
        "gpt_neox.": "model.",
        "lm_head": "model.embed_out",
    },
}


def detects(path: Path) -> bool:
    """Return whether a directory holds an adapter of mlx-lm's. PEFT's settings have the same name,
    but its weights another."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, options: FormatOptions) -> AdapterState:
    """Read a directory that mlx-lm wrote. Raises AdapterError, naming the directory."""
    config = read_json(path / CONFIG)
    try:
        tensors = read_tensors(path / WEIGHTS, shapes_only=options.shapes_only)
        name = name_here(str(config.get("model") or ""), read_beside(path))
        base = options.base or _named_base(name, tensors)
        return state_of(config, tensors, base)
    except AdapterError as error:
        raise AdapterError(f"The MLX adapter in {path} cannot be used: {error}.") from error


def write(state: AdapterState, path: Path, options: FormatOptions) -> list[str]:
    """Write a directory that mlx-lm loads, all of it at once; return notes on what was changed.

    Raises AdapterError for what mlx-lm has no place for or would compute differently.
    """
    base = options.base or _named_base(state.base_name, state.tensors)
    config, tensors, notes = mlx_of(state, base)
    with new_directory(path, marker=WEIGHTS) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_json(new / CONFIG, config)
        write_beside(new, state.training)
    return notes


def _named_base(name: object, keys: Iterable[str]) -> BaseStructure | None:
    """Return the base that an adapter names, where what is called what depends on it."""
    experts = (SWITCH, f".{FACTORS['parameter'][0]}")
    unclear = any(
        not key.startswith(PLAIN_PATHS) or any(name in key for name in experts) for key in keys
    )
    return structure_of(str(name)) if name and unclear else None


def mlx_of(
    state: AdapterState, base: BaseStructure | None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return mlx-lm's configuration and tensors of an adapter, and notes on what was changed."""
    refuse_without_place(state, "mlx")
    state, notes = uniform(state)
    config = state.config
    assert isinstance(config, LoRA)
    layers = list(state.layers())
    _refuse_unlike(layers, config, base)
    scale = config.scaling_of(layers[0].path)
    layers = [own for layer in layers for own in in_mlx(layer, _model_type(base))]
    paths = [layer.path for layer in layers]
    tensors = {}
    for layer in layers:
        moved = _moved(layer.path, base, back=False)
        # (in, rank) and (rank, out), or (vocab, rank) and (rank, dim); of experts as they are
        tensors[f"{moved}.lora_a"] = layer.A.T if layer.A.ndim == 2 else layer.A
        tensors[f"{moved}.lora_b"] = layer.B.T if layer.B.ndim == 2 else layer.B
        if layer.magnitude is not None:
            tensors[f"{moved}.m"] = layer.magnitude
    count, keys = _keys([_moved(path, base, back=False) for path in paths], base)
    return (
        {
            "model": state.hub_name or None,
            "fine_tune_type": "dora" if config.dora else "lora",
            "num_layers": count,
            "lora_parameters": {
                "rank": config.rank,
                "scale": scale,
                "dropout": config.dropout,
                "keys": keys,
            },
        },
        tensors,
        notes,
    )


def state_of(
    config: dict[str, Any], tensors: dict[str, Tensor], base: BaseStructure | None
) -> AdapterState:
    """Return the adapter that mlx-lm's configuration and tensors describe.

    Raises AdapterError, listing every setting that cannot be honoured and every unknown key.
    """
    problems = []
    kind = config.get("fine_tune_type", "lora")  # mlx-lm's own default
    if kind not in TYPES:
        problems.append(f"its fine_tune_type is {kind!r}, and only {' and '.join(TYPES)} are read")
    settings = config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if "alpha" in settings:
        problems.append(
            "lora_parameters has an alpha, by which early versions of mlx-lm multiplied (scale · "
            "alpha / rank) and later ones do not; take it out, and let scale be the factor meant"
        )
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] not in ENDINGS:
            problems.append(f"the key {key!r} is unknown")
        elif tensor.ndim > 2 and not (tensor.ndim == 3 and _has_experts(key, base)):
            problems.append(
                f"{key} is {tuple(tensor.shape)}, of experts, which is read over "
                f"{', '.join(MIXTURES)} alone"
            )
    moved = {key.rpartition(".")[0]: "" for key in tensors}  # mlx-lm's path: transformers'
    if base is None and (unclear := [p for p in moved if not p.startswith(PLAIN_PATHS)]):
        problems.append(
            f"{listed(unclear)} may be an embedding or a linear layer, or have another path in "
            "transformers; name the base"
        )
    embeddings = {p for p, layer in (base.layers if base else {}).items() if not layer.is_linear}
    ours: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        there, _, end = key.rpartition(".")
        path = moved[there] = _moved(there, base, back=True)
        a, b = FACTORS[layer_kind(is_embedding=path in embeddings)]
        name = {"lora_a": a, "lora_b": b, "m": MAGNITUDE}.get(end, end)
        ours[f"{path}.{name}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    if base is not None and base.tied and base.embedding in moved.values():
        problems.append(f"it adapts {base.embedding}, which is the head too, in both of its uses")
    if kind == "dora" and embeddings & set(moved.values()):
        problems.append("its embedding's magnitudes are of tokens, not of dimensions")
    lora = None
    try:
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise TypeError(f"scale is {scale!r}, but must be a number")
        if not isinstance(rank, int):
            raise TypeError(f"rank is {rank!r}, but must be a whole number")
        lora = LoRA(
            rank=rank,
            alpha=scale * rank,
            dropout=settings.get("dropout", 0.0),
            targets=targets_for(set(moved.values()), base),
            dora=kind == "dora",
        )
        if base is not None and _model_type(base) in MIXTURES:
            lora, ours = _with_stacks(lora, ours, scale, base)
    except (ConfigError, TypeError) as error:
        problems.append(f"{CONFIG} does not describe a LoRA ({error})")
    if problems or lora is None:
        raise AdapterError(joined(problems))
    return AdapterState(lora, ours, base_name=str(config.get("model") or ""))


def _with_stacks(
    lora: LoRA, tensors: dict[str, Tensor], scale: float, base: BaseStructure
) -> tuple[LoRA, dict[str, Tensor]]:
    """Return settings and tensors with mlx-lm's projections of experts as stacks."""
    state = AdapterState(lora, tensors)
    before = list(state.layers())
    layers = from_mlx(before, _model_type(base))
    if layers == before:
        return lora, tensors
    ranks = {layer.path: layer.B.shape[-1] for layer in layers}
    ranks = {path: rank for path, rank in ranks.items() if rank != lora.rank}
    lora = replace(
        lora,
        targets=targets_for({layer.path for layer in layers}, base),
        rank_pattern=ranks,
        alpha_pattern={path: scale * rank for path, rank in ranks.items()},
    )
    own = {key for layer in before for key in layer.tensors()}
    alone = {key: tensor for key, tensor in tensors.items() if key not in own}
    return lora, {k: t for layer in layers for k, t in layer.tensors().items()} | alone


def _model_type(base: BaseStructure | None) -> str:
    return "" if base is None else base.config.model_type


def _has_experts(key: str, base: BaseStructure | None) -> bool:
    return SWITCH in key and _model_type(base) in MIXTURES


def _refuse_unlike(layers: list[StoredLayer], config: LoRA, base: BaseStructure | None) -> None:
    """Raise AdapterError for layers that mlx-lm would compute or name differently."""
    problems = []
    paths = [layer.path for layer in layers]
    embeddings = [layer.path for layer in layers if layer.is_embedding]
    if unknown := [x.path for x in layers if not in_mlx(x, _model_type(base))]:
        names = ", ".join(MIXTURES)
        problems.append(f"{listed(unknown)} has a name in mlx-lm that is known for {names} alone")
    if base is None:
        unclear = [path for path in paths if not path.startswith(PLAIN_PATHS)]
        if unclear:
            problems.append(
                f"the path of {listed(unclear)} in MLX depends on the base; name it with --base"
            )
    elif base.tied:
        shared = [
            p for p in paths if p == base.embedding or (p in base.layers and base.layers[p].is_head)
        ]
        if shared:
            problems.append(
                f"{listed(shared)} is embedding and head in one weight, and mlx-lm adapts both of "
                "its uses or none; merge it"
            )
    if config.dora and embeddings:
        problems.append(
            f"DoRA over {listed(embeddings)}: its magnitudes are of tokens there, of dimensions "
            "here"
        )
    if problems:
        raise AdapterError(f"MLX cannot express this adapter: {joined(problems)}.")


def _keys(paths: list[str], base: BaseStructure | None) -> tuple[int, list[str]]:
    """Return num_layers and keys with which mlx-lm selects these layers and no others.

    A key is a whole path, or a path inside the last num_layers blocks (-1: inside all blocks).
    """
    inside: dict[int, set[str]] = defaultdict(set)
    outside = []
    for path in paths:
        block, rest = _in_block(path)
        if block is None:
            outside.append(path)
        else:
            inside[block].add(rest)
    if not inside:
        return -1, outside
    first, last = min(inside), max(inside)
    whole = set(inside) == set(range(first, last + 1))
    alike = len({frozenset(rests) for rests in inside.values()}) == 1
    # A layer that mlx-lm adapts and the file lacks stays as it was, since b starts at zero.
    to_the_end = first == 0 if base is None else last == base.blocks - 1
    if whole and alike and to_the_end:
        count = -1 if first == 0 else last + 1 - first
        return count, sorted(inside[first]) + outside
    return -1, paths


def _in_block(path: str) -> tuple[int | None, str]:
    """Return the number of a path's block and the path inside it; None outside of blocks."""
    steps = path.split(".")
    for i, step in enumerate(steps):
        if step.isdigit():
            return int(step), ".".join(steps[i + 1 :])
    return None, path


def _moved(path: str, base: BaseStructure | None, *, back: bool) -> str:
    """Return a layer's path in mlx-lm's model, or with `back` its path in transformers'."""
    moved = MOVED.get(base.config.model_type, {}) if base else {}
    pairs = [(b, a) if back else (a, b) for a, b in moved.items()]
    for start, there in sorted(pairs, key=lambda pair: -len(pair[0])):
        if path.startswith(start):
            return there + path[len(start) :]
    return path
