"""An adapter from the settings and tensors in PEFT's files: pure, without files."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ConfigError, VeneerWarning, joined, listed
from veneer.formats.base_structure import BaseStructure
from veneer.formats.peft import virtual
from veneer.formats.peft.experts import experts_apart, parameter_paths
from veneer.formats.peft.rules import (
    BELOW,
    ENDINGS,
    PREFIX,
    TOKENS,
    excluded,
    in_modules_to_save,
    is_bias,
    layers_of,
    malformed,
    matching,
    names_without,
    targets_of,
    tokens_named,
    unreadable,
)
from veneer.formats.state import BIAS, FACTORS, MAGNITUDE, AdapterState, StoredTokens

A_NAME, B_NAME = FACTORS["linear"]


@dataclass
class _Tensors:
    """The tensors of a file by what they are."""

    # By the module's path in the file, and our name of the tensor.
    layers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    token_rows: dict[str, Tensor] = field(default_factory=dict)
    modules_to_save: dict[str, Tensor] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def state_of(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    base: BaseStructure | None = None,
) -> AdapterState:
    """Return the adapter that PEFT's configuration and tensors describe.

    base: if it is there, it says which layers and parameters target names can mean.

    Raises AdapterError, listing every setting that cannot be honoured and every key that is
    unknown.
    """
    if str(config.get("peft_type")) in virtual.TYPES:
        return virtual.state_of(config, tensors)
    if problems := malformed(config):
        raise AdapterError(joined(problems))
    if config.get("peft_type") != "LORA":
        types = ", ".join(("LORA", *virtual.TYPES))
        problems.append(f"its peft_type is {config.get('peft_type')!r}, and only {types} are read")
    problems += unreadable(config)
    by_kind = _by_kind(config, tensors)
    layers = by_kind.layers
    problems += [f"the key {key!r} is unknown" for key in by_kind.unknown]
    problems += _missing(config, by_kind)
    trained_tokens = _trained_tokens(config, by_kind.token_rows, problems)
    try:
        adapted = parameter_paths(
            config, list(layers), problems, None if base is None else base.parameters
        )
        problems += excluded(config, [module for module in layers if module not in adapted])
        lora = _lora(config, layers, adapted, base)
    except (ConfigError, TypeError, KeyError) as error:
        problems.append(f"adapter_config.json does not describe a LoRA ({error})")
    if problems:
        raise AdapterError(joined(problems))
    return AdapterState(
        lora,
        _our_tensors(layers, adapted, lora),
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_weights=by_kind.base_weights,
        modules_to_save=by_kind.modules_to_save,
        trained_tokens=trained_tokens,
        task=config.get("task_type") or "",
    )


def _by_kind(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Tensors:
    by_kind = _Tensors()
    to_save = config.get("modules_to_save") or []
    tied = config.get("ensure_weight_tying") and to_save
    has_biases = config.get("bias", "none") != "none"
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        name = next((n for n, end in ENDINGS.items() if path.endswith(f".{end}")), None)
        base_path = path.replace(f"{BELOW}.", ".")
        if path == key:
            by_kind.unknown.append(key)
        elif name is not None:
            by_kind.layers[path.removesuffix(f".{ENDINGS[name]}")][name] = tensor
        elif path.endswith(TOKENS):
            by_kind.token_rows[path.removesuffix(TOKENS)] = tensor
        elif ".original_module." in path:
            by_kind.base_weights[path.replace(".original_module.", ".")] = tensor
        elif ".modules_to_save." in path:
            # bias='all' saves the biases of saved modules a second time.
            by_kind.modules_to_save.setdefault(path.replace(".modules_to_save.", "."), tensor)
        elif (
            in_modules_to_save(to_save, base_path)
            or (is_bias(path) and has_biases)
            or (tied and BELOW not in path)  # the head, saved with the embedding
        ):
            by_kind.modules_to_save[base_path] = tensor
        elif path.endswith(".weight"):
            # PEFT saves an adapted embedding's own weight along with the adapter.
            by_kind.base_weights[base_path] = tensor
        else:
            by_kind.unknown.append(key)
    return by_kind


def _missing(config: Mapping[str, Any], by_kind: _Tensors) -> list[str]:
    """Return which tensors the settings lack, and which settings lack tensors."""
    problems = []
    for module, tensors in by_kind.layers.items():
        if B_NAME in tensors and (BIAS in tensors) != bool(config.get("lora_bias")):
            has = "has one" if BIAS in tensors else "has none"
            problems.append(f"lora_bias is {config.get('lora_bias')!r}, but {module} {has}")
    modules_to_save = by_kind.modules_to_save
    for name in config.get("modules_to_save") or []:
        has_some = any(in_modules_to_save([name], path) for path in modules_to_save)
        # PEFT names these for every classifier, and a model has one of them.
        if not has_some and not (modules_to_save and name in ("classifier", "score")):
            problems.append(f"modules_to_save has {name!r}, for which there are no weights")
    return problems


def _trained_tokens(
    config: Mapping[str, Any], rows: Mapping[str, Tensor], problems: list[str]
) -> dict[str, StoredTokens]:
    """Return the trained tokens of each layer, and add to `problems` what does not fit."""
    try:
        named = tokens_named(config)
    except TypeError as error:
        problems.append(str(error))
        return {}
    if isinstance(named, list):
        named = dict.fromkeys(rows, named) if named or rows else {}
        if len(named) != bool(config.get("trainable_token_indices")):
            problems.append(
                f"trainable_token_indices names tokens, and there are rows of {len(rows)} layers"
            )
    tokens: dict[str, StoredTokens] = {}
    for name, ids in named.items():
        paths = [path for path in rows if path.endswith(name)]
        tokens |= {path: StoredTokens(tuple(ids), rows[path]) for path in paths}
        if not paths and ids in [other for n, other in named.items() if n != name]:
            tokens[name] = StoredTokens(tuple(ids), None)  # shared with the other layer
        elif not paths:
            problems.append(f"trainable_token_indices names {name!r}, of which there are no rows")
    problems += [
        f"trainable_token_indices does not say whose rows {path} has"
        for path in rows
        if path not in tokens
    ]
    return tokens


def _our_tensors(
    layers: Mapping[str, dict[str, Tensor]], parameters: Mapping[str, str], lora: LoRA
) -> dict[str, Tensor]:
    """Return the tensors of layers and parameters under our names and in our shapes."""
    tensors: dict[str, Tensor] = {}
    for module, stored in layers.items():
        path = parameters.get(module, module)
        own = dict(stored)
        if (B := own.get(B_NAME)) is not None and B.ndim == 4:
            own[B_NAME] = B.flatten(1)
        if MAGNITUDE in own:
            own[MAGNITUDE] = own[MAGNITUDE].flatten()
        if module in parameters:
            factors = [own.pop(name, None) for name in (A_NAME, B_NAME)]
            A, B = factors
            if A is not None and B is not None:
                factors = [*experts_apart(A, B, lora.rank_of(path))]
            names = zip(FACTORS["parameter"], factors, strict=True)
            own |= {name: factor for name, factor in names if factor is not None}
        tensors |= {f"{path}.{name}": tensor for name, tensor in own.items()}
    return tensors


def _is_experts(path: str) -> bool:
    """Return whether a path is that of a projection of one of many, as `experts.0.w1` is."""
    return re.search(r"\.\d+\.[^.]+$", path) is not None


def _warn_of_missing_projections(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Warn of targets without weights in a file of single experts. The base has stacks instead of
    layers of these names, so that nobody else would miss them."""
    names = config["target_modules"]
    if names is None or isinstance(names, str):
        return
    if missing := sorted(names_without(names, known)):
        warnings.warn(
            "This adapter adapts experts one by one, and its target_modules name "
            f"{listed(missing)} too, of which it has no weights: these layers stay as the base has "
            "them.",
            VeneerWarning,
            stacklevel=2,
        )


def _invocation(tokens: object) -> tuple[int, ...] | None:
    """Return the ids of an invocation's tokens. Raises TypeError for anything but a list of ids."""
    if not tokens:
        return None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise TypeError(f"alora_invocation_tokens is {tokens!r}, but must be a list of numbers")
    return tuple(tokens)


def _lora(
    config: Mapping[str, Any],
    layers: Mapping[str, dict[str, Tensor]],
    parameters: Mapping[str, str],
    base: BaseStructure | None,
) -> LoRA:
    modules = [module for module in layers if module not in parameters]
    known = None if base is None else [*modules, *base.layers]
    if base is not None and any(map(_is_experts, {*modules} - {*base.layers})):
        _warn_of_missing_projections(config, [*modules, *base.layers])
    targets = [*targets_of(config, modules, known), *sorted(set(parameters.values()))]
    if config["lora_alpha"] is None:
        raise TypeError("lora_alpha is None")
    paths = [*modules, *parameters.values()]
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=targets,
        layers=layers_of(config),
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
        invocation=_invocation(config.get("alora_invocation_tokens")),
        rank_pattern=matching(config.get("rank_pattern") or {}, paths),
        alpha_pattern=matching(config.get("alpha_pattern") or {}, paths),
    )
