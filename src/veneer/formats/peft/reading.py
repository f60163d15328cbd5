"""From what PEFT's files say to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.adapter.patterns import Matcher
from veneer.errors import AdapterError, ConfigError, joined
from veneer.formats.parts import BIAS, LINEAR, MAGNITUDE, PARAMETER
from veneer.formats.peft import virtual as peft_virtual
from veneer.formats.peft.rules import (
    BELOW,
    ENDINGS,
    PREFIX,
    TOKENS,
    experts_apart,
    is_bias,
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
from veneer.formats.state import AdapterState, Tokens


def state_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    """Return the adapter that PEFT's configuration and tensors describe.

    Raises AdapterError, listing every part that cannot be honoured and every key that is unknown.
    """
    if str(config.get("peft_type")) in peft_virtual.TYPES:
        return peft_virtual.state_of(config, tensors)
    if problems := malformed(config):
        raise AdapterError(joined(problems))
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
            or (is_bias(plain) and config.get("bias", "none") != "none")
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
        raise AdapterError(joined(problems))
    return AdapterState(
        lora,
        _ours(found, places, lora),
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_weights=base_weights,
        saved=saved,
        tokens=tokens,
        task=config.get("task_type") or "",
    )


def _missing(
    config: Mapping[str, Any], found: Mapping[str, dict[str, Tensor]], saved: Mapping[str, Tensor]
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
