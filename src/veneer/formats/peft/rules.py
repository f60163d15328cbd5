"""PEFT's rules: which layers its settings name, and what a key in its file belongs to.

Patterns are PEFT's own regular expressions, matched as it matches them (check_target_module_exists
in peft/tuners/tuners_utils.py, set_additional_trainable_modules in peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.adapter.patterns import Matcher, pattern_problems
from veneer.formats.state import BIAS, FACTORS, MAGNITUDE

PREFIX = "base_model.model."
# Our tensor's name: how PEFT's key ends. Embeddings and magnitudes have no `.weight` there.
ENDINGS = {name: f"{name}.weight" for name in FACTORS["linear"]}
ENDINGS |= {name: name for name in FACTORS["embedding"]}
ENDINGS |= {MAGNITUDE: "lora_magnitude_vector", BIAS: "lora_B.bias"}
TOKENS = ".token_adapter.trainable_tokens_delta"
BELOW = ".base_layer"  # the base's own layer, in an adapted one

# Settings that change what an adapter computes, or what its base is, and that are not read.
NOT_READ = (
    "alora_invocation_tokens",
    "arrow_config",
    "enable_lora",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Settings that are read, or that no longer matter once an adapter is trained.
READ = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights"),
    *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
    *("trainable_token_indices", "use_dora", "use_rslora"),
)
# Starts by which PEFT takes something off the base's own weights, each time that it loads them.
OTHER_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")


def unreadable(config: Mapping[str, Any]) -> list[str]:
    """Return what of PEFT's settings cannot be honoured, each by its name."""
    problems = [f"{name} is not read" for name in NOT_READ if config.get(name)]
    problems += [
        f"{name} is a setting that is not known"
        for name, value in config.items()
        if value and name not in READ and name not in NOT_READ
    ]
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(OTHER_BASES):
        problems.append(
            f"init_lora_weights is {start!r}, so that it belongs to a base with other weights; "
            "save it in PEFT with path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {config['bias']!r}, and only none, all and lora_only are read")
    return problems


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Return which of PEFT's settings have a type that its rules cannot be applied to."""
    problems = [
        f"{name} is {config[name]!r}, but must be a list of names"
        for name in ("modules_to_save", "target_parameters")
        if not _are_names(config.get(name))
    ]
    problems += [
        f"{name} is {config[name]!r}, but must be a name or a list of names"
        for name in ("exclude_modules", "layers_pattern")
        if not isinstance(config.get(name), str) and not _are_names(config.get(name))
    ]
    return problems or _no_patterns(config)


def targets_of(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Return the targets that mean the modules which PEFT's settings name.

    paths: of the modules that there are tensors for, which take the place of settings that have no
    pattern (all-linear with exceptions, the head that is tied to an embedding).
    """
    targets = config["target_modules"]
    if targets is None and config.get("target_parameters"):
        targets = []
    if config.get("ensure_weight_tying"):
        return sorted(paths)  # among which is the head, where the embedding is adapted
    exclusion = _exclusion(config)
    if isinstance(targets, str):
        # PEFT matches a string against the whole path.
        if targets == "all-linear":
            return sorted(paths) if exclusion else ["all"]
        return [f"re:^{exclusion}(?:{targets})$"]
    if not exclusion and not config.get("layers_pattern"):
        return sorted(targets)
    names = "|".join(map(re.escape, sorted(targets)))
    return [f"re:^{exclusion}{_in_layers(config)}(?:.*\\.)?(?:{names})$"] if names else []


def layers_of(config: Mapping[str, Any]) -> str | None:
    """Return the slices of blocks that PEFT's settings name, or None where a pattern says it."""
    blocks = config.get("layers_to_transform")
    if blocks is None or blocks == [] or config.get("layers_pattern"):
        return None
    return ",".join(str(b) for b in (blocks if isinstance(blocks, list) else [blocks]))


def excluded(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Return, as problems, the modules that have tensors but are excluded by the settings.

    Raises ConfigError for a pattern that takes too long to match.
    """
    problems, matcher = [], Matcher()
    for name in ("exclude_modules", "modules_to_save"):
        if lookahead := _exclusion({name: config.get(name)}):
            problems += [
                f"{name} leaves out {path}, of which there are tensors"
                for path in paths
                if not matcher.within(f"re:^{lookahead}", path)
            ]
    return problems


def matching(patterns: Any, paths: Sequence[str]) -> Any:
    """Return the patterns that match the end of a path; PEFT ignores the others.

    What is no map is returned as it is, and refused later. Raises ConfigError for an invalid
    pattern.
    """
    if not isinstance(patterns, dict):
        return patterns
    matcher = Matcher()
    return {
        pattern: value
        for pattern, value in patterns.items()
        if any(matcher.at_end(pattern, path) for path in paths)
    }


def in_modules_to_save(names: Iterable[str], path: str) -> bool:
    """Return whether a weight belongs to a module that one of modules_to_save's names means."""
    steps = path.split(".")[:-1]
    modules = [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
    return any(module.endswith(name) for module in modules for name in names)


def is_bias(path: str) -> bool:
    """Return whether a weight is a bias."""
    return path.rpartition(".")[2] == "bias"


def tokens_named(config: Mapping[str, Any]) -> dict[str, list[int]] | list[int]:
    """Return the tokens with rows of their own: for each name of a layer, or for the embedding.

    Raises TypeError where the setting is neither.
    """
    indices = config.get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    for ids in lists:
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise TypeError(f"trainable_token_indices is {indices!r}, but must be lists of numbers")
    return indices


def targets_module(config: Mapping[str, Any], path: str, matcher: Matcher) -> bool:
    """Return whether target_modules names the module at `path`."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return matcher.within(f"re:^(?:{targets})$", path)
    return any(f".{path}".endswith(f".{name}") for name in targets)


def _exclusion(config: Mapping[str, Any]) -> str:
    """Return a pattern that fails in front of paths which PEFT leaves out."""
    exclude, to_save = config.get("exclude_modules"), config.get("modules_to_save")
    pattern = ""
    if isinstance(exclude, str) and exclude:
        pattern += f"(?!(?:{exclude})$)"
    elif exclude:
        pattern += f"(?!(?:.*\\.)?(?:{'|'.join(map(re.escape, sorted(exclude)))})$)"
    if to_save:  # PEFT takes these names as patterns here
        pattern += f"(?!(?:.*\\.)?(?:{'|'.join(to_save)})(?:\\..*)?$)"
    return pattern


def _in_layers(config: Mapping[str, Any]) -> str:
    """Return a pattern that fails in front of paths in other blocks than layers_to_transform has.

    The first number behind the layers' name counts, and behind the first name that is there.
    """
    blocks, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if not names or blocks is None or blocks == []:
        return ""
    names = [names] if isinstance(names, str) else names
    first = "|".join(rf"(?:|.*?\.){name}\.(?=\d+\.)" for name in names)
    numbers = "|".join(
        re.escape(str(b)) for b in (blocks if isinstance(blocks, list) else [blocks])
    )
    return rf"(?=(?>{first})(?:{numbers})\.)"


def _no_patterns(config: Mapping[str, Any]) -> list[str]:
    """Return which settings that PEFT takes as patterns are none."""
    patterns = []
    for name in ("exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(name)
        if isinstance(value, str):
            patterns.append(value)
        elif name != "exclude_modules":  # a list of which is taken to the letter
            patterns += value or []
    return pattern_problems(patterns)


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
