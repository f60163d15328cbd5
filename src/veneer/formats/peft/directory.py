"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.errors import AdapterError, shortened
from veneer.files import (
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from veneer.formats.card import card
from veneer.formats.parts import BIAS, EMBEDDING, LINEAR, MAGNITUDE
from veneer.formats.peft import virtual as peft_virtual
from veneer.formats.peft.reading import state_of
from veneer.formats.peft.rules import (
    BELOW,
    ENDINGS,
    ORDER,
    PREFIX,
    TOKENS,
    experts_together,
    is_bias,
)
from veneer.formats.state import KINDS, AdapterState, Tokens

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICKLE = "adapter_model.bin"


def config_of(state: AdapterState) -> dict[str, Any]:
    """Return what adapter_config.json says of an adapter.

    Ranks and alphas of single layers are keyed by whole paths: PEFT sorts patterns on saving, and
    the first that matches wins, so that any pattern that overlaps another could change its meaning.
    """
    if isinstance(state.config, Method):
        return peft_virtual.config_of(state, _virtual_of(state.config))
    config, layers = state.config, list(state.layers())
    paths = [layer.path for layer in layers]
    ranks = {path: config.rank_of(path) for path in paths}
    alphas = {path: _number(config.alpha_of(path)) for path in paths}
    alpha = _number(float(config.alpha or 0))
    parameters = [layer.path for layer in layers if layer.kind == "parameter"]
    modules, biases = _saved_modules(state), _saved_biases(state)
    targets = list(config.targets)
    if parameters or modules or not paths:
        targets = [layer.path for layer in layers if layer.kind != "parameter"]
    return {
        "peft_type": "LORA",
        "task_type": state.task or None,
        "base_model_name_or_path": state.base_name or None,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else config.dropout,
        "target_modules": targets,
        "target_parameters": parameters or None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": any(layer.bias is not None for layer in layers),
        "rank_pattern": {path: r for path, r in ranks.items() if r != config.rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "bias": biases,
        "modules_to_save": modules or None,
        "trainable_token_indices": {p: list(t.ids) for p, t in state.tokens.items()} or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def tensors_of(state: AdapterState) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's keys.

    Raises AdapterError for new words whose rows are none of the base's, and for several parameters
    of one module that PEFT's file could not tell apart.
    """
    if isinstance(state.config, Method):
        return peft_virtual.tensors_of(state, _virtual_of(state.config))
    renamed: dict[str, Tensor] = {}
    levels = _levels(state)
    adapted = {layer.path for layer in state.layers()}
    for layer in state.layers():
        A, B = layer.A, layer.B
        magnitude = layer.magnitude
        if layer.kind == "parameter":
            A, B = experts_together(A, B)
        elif A.ndim == 4:  # a convolution of one pixel, and one magnitude a channel
            B = B[:, :, None, None]
            magnitude = None if magnitude is None else magnitude[None, :, None, None]
        place = f"{PREFIX}{levels.get(layer.path, layer.path)}"
        names = EMBEDDING if layer.is_embedding else LINEAR
        values = (A, B, magnitude, layer.bias)
        for name, tensor in zip((*names, MAGNITUDE, BIAS), values, strict=True):
            if tensor is not None:
                renamed[f"{place}.{ENDINGS[name]}"] = tensor
    for path, weight in state.saved.items():
        place, _, leaf = path.rpartition(".")
        below = BELOW if place in adapted else ""
        renamed[f"{PREFIX}{place}{below}.{leaf}"] = weight
    for path, tokens in state.tokens.items():
        if tokens.rows is not None:
            renamed[f"{PREFIX}{path}{TOKENS}"] = tokens.rows
    return renamed


def without_start(state: AdapterState) -> AdapterState:
    """Return the same adapter as a plain one, of twice the rank where A and B did not start at
    zero: B A − B₀ A₀ is one product of that rank."""
    config = state.config
    if not isinstance(config, LoRA) or not any(layer.start for layer in state.layers()):
        return state
    tensors = {}
    for layer in state.layers():
        names = KINDS[layer.kind]
        one = Adapter(layer.A.flatten(1), layer.B, scaling=1.0, start=layer.start)
        # What is no linear layer has no start; zeros bring it to the same rank.
        A, B = (factor.detach() for factor in one.factors())
        wide = 2 * config.rank_of(layer.path) - len(A)
        tensors[f"{layer.path}.{names[0]}"] = F.pad(A, (0, 0, 0, wide)).unflatten(
            1, layer.A.shape[1:]
        )
        tensors[f"{layer.path}.{names[1]}"] = F.pad(B, (0, wide))
        for name, tensor in ((MAGNITUDE, layer.magnitude), (BIAS, layer.bias)):
            if tensor is not None:
                tensors[f"{layer.path}.{name}"] = tensor
    # scaling is alpha / rank, or alpha / √rank, and stays as it was.
    stronger = 2**0.5 if config.rslora else 2
    assert config.alpha is not None
    plain = replace(
        config,
        rank=2 * config.rank,
        alpha=stronger * config.alpha,
        rank_pattern={path: 2 * rank for path, rank in config.rank_pattern.items()},
        alpha_pattern={path: stronger * alpha for path, alpha in config.alpha_pattern.items()},
        init="auto",
    )
    return replace(state, config=plain, tensors=tensors)


def with_words_as_tokens(state: AdapterState) -> AdapterState:
    """Return the same adapter with its new words as rows of words that the base has.

    Raises AdapterError where the base has no rows in their places, for PEFT makes none.
    """
    rows = state.rows
    if rows is None:
        return state
    if not rows.places:
        raise AdapterError(
            "An adapter with new words can be written for PEFT only where its base has rows in "
            "their places, and a head without a bias; merge it, or write it natively."
        )
    ids = tuple(range(rows.start, rows.start + len(rows.words)))
    values = zip(rows.places, (rows.embedding, rows.head), strict=False)
    tokens = {path: Tokens(ids, value) for path, value in values if value is not None}
    return replace(state, rows=None, tokens=tokens)


def write(state: AdapterState, directory: Path) -> None:
    """Write a directory that PEFT, and what reads its format, loads; all of it at once."""
    state = without_start(with_words_as_tokens(state))
    tensors, config = tensors_of(state), config_of(state)
    with new_directory(directory, marker=CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_text(new / CARD, card(state))
        write_json(new / CONFIG, config)


def read(directory: Path, *, allow_bin: bool = False) -> AdapterState:
    """Read a directory that PEFT wrote; its adapter_model.bin, a pickle, only if that is allowed,
    and then nothing but tensors. Raises AdapterError, naming the directory."""
    config = read_json(directory / CONFIG)
    weights = directory / WEIGHTS
    if not weights.is_file():
        weights = directory / PICKLE
        if not allow_bin:
            raise AdapterError(
                f"{weights} is a pickle, which is read on demand only, and then nothing of it but "
                "tensors: give --allow-bin, or allow_bin=True. A file of safetensors needs no such "
                "care."
            )
    try:
        return state_of(config, read_tensors(weights))
    except AdapterError as error:
        why = shortened(str(error), 20_000)
        raise AdapterError(f"The PEFT adapter in {directory} cannot be used: {why}.") from error


def is_here(directory: Path) -> bool:
    """Return whether a directory holds an adapter of PEFT's, readable or not."""
    weights = (directory / name for name in (WEIGHTS, PICKLE))
    return (directory / CONFIG).is_file() and any(file.is_file() for file in weights)


def _virtual_of(config: Method) -> Method:
    if config.replaces_weights:
        raise AdapterError(f"PEFT has no format for {config.method}; write it natively.")
    return config


def _levels(state: AdapterState) -> dict[str, str]:
    """Return where in PEFT's file each parameter's tensors are: those of one module are nested, and
    the last is the outermost."""
    owners: dict[str, list[str]] = {}
    for layer in state.layers():
        if layer.kind == "parameter":
            owner, _, name = layer.path.rpartition(".")
            owners.setdefault(owner, []).append(name)
    places = {}
    for owner, names in owners.items():
        if len(names) > 1 and (unknown := [name for name in names if name not in ORDER]):
            raise AdapterError(
                f"PEFT could not tell whose tensors are whose of {owner}: {', '.join(unknown)}; "
                "merge the adapter, or write it natively."
            )
        in_order = sorted(names, key=lambda name: [*ORDER, name].index(name), reverse=True)
        for level, name in enumerate(in_order):
            places[f"{owner}.{name}"] = owner + BELOW * level
    return places


def _saved_modules(state: AdapterState) -> list[str]:
    return sorted({path.rpartition(".")[0] for path in state.saved if not is_bias(path)})


def _saved_biases(state: AdapterState) -> str:
    """Return which biases of the base have been trained, in PEFT's words."""
    modules, adapted = _saved_modules(state), {layer.path for layer in state.layers()}
    owners = {path.rpartition(".")[0] for path in state.saved if is_bias(path)} - {*modules}
    if not owners:
        return "none"
    return "lora_only" if owners <= adapted else "all"


def _number(alpha: float) -> int | float:
    # Readers such as vLLM and llama.cpp expect an integer where the alpha is one.
    return int(alpha) if float(alpha).is_integer() else alpha
