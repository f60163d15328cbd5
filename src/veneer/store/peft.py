"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.errors import AdapterError, ConfigError, listed, shortened
from veneer.lowrank.adapter import Adapter
from veneer.lowrank.config import LoRA
from veneer.methods.config import Method
from veneer.plan.patterns import Matcher
from veneer.store import peft_virtual
from veneer.store.card import card
from veneer.store.files import (
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from veneer.store.parts import BIAS, EMBEDDING, LINEAR, MAGNITUDE, PARAMETER
from veneer.store.peft_rules import (
    ORDER,
    experts_apart,
    experts_together,
    is_saved,
    layers_of,
    left_out,
    malformed,
    matching,
    named_parameters,
    targets_of,
    tokens_named,
    unreadable,
)
from veneer.store.state import KINDS, AdapterState, Tokens

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
# Our tensor's name: how PEFT's key ends. Embeddings and magnitudes have no `.weight` there.
ENDINGS = {name: f"{name}.weight" for name in LINEAR} | {name: name for name in EMBEDDING}
ENDINGS |= {MAGNITUDE: "lora_magnitude_vector", BIAS: "lora_B.bias"}
TOKENS = ".token_adapter.trainable_tokens_delta"
BELOW = ".base_layer"  # the base's own layer, in an adapted one


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


def state_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    """Return the adapter that PEFT's configuration and tensors describe.

    Raises AdapterError, listing every part that cannot be honoured and every key that is unknown.
    """
    if str(config.get("peft_type")) in peft_virtual.TYPES:
        return peft_virtual.state_of(config, tensors)
    if problems := malformed(config):
        raise AdapterError(listed(problems))
    if config.get("peft_type") != "LORA":
        known = ", ".join(("LORA", *peft_virtual.TYPES))
        problems.append(f"its peft_type is {config.get('peft_type')!r}, and only {known} are read")
    problems += unreadable(config)
    found: dict[str, dict[str, Tensor]] = {}  # by module as in the file, and our name
    rows: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    base_weights: dict[str, Tensor] = {}
    tied = config.get("ensure_weight_tying") and config.get("modules_to_save")
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        ours = next((n for n, end in ENDINGS.items() if plain.endswith(f".{end}")), None)
        own = plain.replace(f"{BELOW}.", ".")  # the base's own path
        if plain == key:
            problems.append(f"the key {key!r} is unknown")
        elif ours is not None:
            module = plain.removesuffix(f".{ENDINGS[ours]}")
            found.setdefault(module, {})[ours] = tensor
        elif plain.endswith(TOKENS):
            rows[plain.removesuffix(TOKENS)] = tensor
        elif ".original_module." in plain:
            base_weights[plain.replace(".original_module.", ".")] = tensor
        elif ".modules_to_save." in plain:
            # bias='all' saves the biases of saved modules a second time.
            saved.setdefault(plain.replace(".modules_to_save.", "."), tensor)
        elif (
            is_saved(config, own)
            or (_is_bias(plain) and config.get("bias", "none") != "none")
            or (tied and BELOW not in plain)  # the head, saved with the embedding
        ):
            saved[own] = tensor
        elif plain.endswith(".weight"):
            # PEFT saves an adapted embedding's own weight along with the adapter.
            base_weights[own] = tensor
        else:
            problems.append(f"the key {key!r} is unknown")
    problems += _missing(config, found, saved)
    tokens = _tokens(config, rows, problems)
    try:
        places = named_parameters(config, list(found), problems, Matcher())
        problems += left_out(config, [module for module in found if module not in places])
        lora = _lora(config, found, places)
    except (ConfigError, TypeError, KeyError) as error:
        problems.append(f"adapter_config.json does not describe a LoRA ({error})")
    if problems:
        raise AdapterError(listed(problems))
    return AdapterState(
        lora,
        _ours(found, places, lora),
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_weights=base_weights,
        saved=saved,
        tokens=tokens,
        task=config.get("task_type") or "",
    )


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
    return sorted({path.rpartition(".")[0] for path in state.saved if not _is_bias(path)})


def _saved_biases(state: AdapterState) -> str:
    """Return which biases of the base have been trained, in PEFT's words."""
    modules, adapted = _saved_modules(state), {layer.path for layer in state.layers()}
    owners = {path.rpartition(".")[0] for path in state.saved if _is_bias(path)} - {*modules}
    if not owners:
        return "none"
    return "lora_only" if owners <= adapted else "all"


def _missing(
    config: Mapping[str, Any],
    found: Mapping[str, dict[str, Tensor]],
    saved: Mapping[str, Tensor],
) -> list[str]:
    """Return which settings speak of tensors that are not there, and the other way round."""
    problems = []
    for module, parts in found.items():
        if LINEAR[1] in parts and (BIAS in parts) != bool(config.get("lora_bias")):
            there = "has one" if BIAS in parts else "has none"
            problems.append(f"lora_bias is {config.get('lora_bias')!r}, but {module} {there}")
    for name in config.get("modules_to_save") or []:
        has_some = any(is_saved({"modules_to_save": [name]}, path) for path in saved)
        # PEFT names these for every classifier, and a model has one of them.
        if not has_some and not (saved and name in ("classifier", "score")):
            problems.append(f"modules_to_save has {name!r}, for which there are no weights")
    return problems


def _tokens(
    config: Mapping[str, Any], rows: Mapping[str, Tensor], problems: list[str]
) -> dict[str, Tokens]:
    """Return which words have rows of their own in which layer."""
    try:
        named = tokens_named(config)
    except TypeError as error:
        problems.append(str(error))
        return {}
    if isinstance(named, list):
        named = dict.fromkeys(rows, named) if named or rows else {}
        if len(named) != bool(config.get("trainable_token_indices")):
            problems.append(
                f"trainable_token_indices names words, and there are rows of {len(rows)} layers"
            )
    found: dict[str, Tokens] = {}
    for name, ids in named.items():
        places = [path for path in rows if path.endswith(name)]
        found |= {path: Tokens(tuple(ids), rows[path]) for path in places}
        if not places and ids in [other for n, other in named.items() if n != name]:
            found[name] = Tokens(tuple(ids), None)
        elif not places:
            problems.append(f"trainable_token_indices names {name!r}, of which there are no rows")
    problems += [
        f"trainable_token_indices does not say whose rows {path} has"
        for path in rows
        if path not in found
    ]
    return found


def _ours(
    found: Mapping[str, dict[str, Tensor]], places: Mapping[str, str], lora: LoRA
) -> dict[str, Tensor]:
    """Return the tensors of layers and parameters under our names and in our shapes."""
    tensors: dict[str, Tensor] = {}
    for module, parts in found.items():
        path = places.get(module, module)
        kept = dict(parts)
        A, B = (kept.get(name) for name in LINEAR)
        if B is not None and B.ndim == 4:
            kept[LINEAR[1]] = B.flatten(1)
        if MAGNITUDE in kept:
            kept[MAGNITUDE] = kept[MAGNITUDE].flatten()
        if module in places:
            if A is not None and B is not None:
                A, B = experts_apart(A, B, lora.rank_of(path))
            halves = zip(PARAMETER, (A, B), strict=True)
            kept = {n: t for n, t in kept.items() if n not in LINEAR}
            kept |= {name: half for name, half in halves if half is not None}
        tensors |= {f"{path}.{name}": tensor for name, tensor in kept.items()}
    return tensors


def _lora(
    config: Mapping[str, Any], found: Mapping[str, dict[str, Tensor]], places: Mapping[str, str]
) -> LoRA:
    modules = [module for module in found if module not in places]
    targets = [*targets_of(config, modules), *sorted(set(places.values()))]
    if config["lora_alpha"] is None:
        raise TypeError("lora_alpha is None")
    paths = [*modules, *places.values()]
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=targets,
        layers=layers_of(config),
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
        rank_pattern=matching(config.get("rank_pattern") or {}, paths),
        alpha_pattern=matching(config.get("alpha_pattern") or {}, paths),
    )


def _is_bias(path: str) -> bool:
    return path.rpartition(".")[2] == "bias"


def _number(alpha: float) -> int | float:
    # Readers such as vLLM and llama.cpp expect an integer where the alpha is one.
    return int(alpha) if float(alpha).is_integer() else alpha
