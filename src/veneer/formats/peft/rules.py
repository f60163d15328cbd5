"""PEFT's rules: which layers its settings select, and how the keys in its files are read.

Patterns are PEFT's own regular expressions, matched as it matches them (check_target_module_exists
in peft/tuners/tuners_utils.py, set_additional_trainable_modules in peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from veneer.adapter.patterns import Matcher, pattern_problems
from veneer.formats.state import BIAS, FACTORS, MAGNITUDE

PREFIX = "base_model.model."
# Our tensor's name: the end of PEFT's key, where embeddings and magnitudes have no `.weight`.
ENDINGS = {name: f"{name}.weight" for name in FACTORS["linear"]}
ENDINGS |= {name: name for name in FACTORS["embedding"]}
ENDINGS |= {MAGNITUDE: "lora_magnitude_vector", BIAS: "lora_B.bias"}
TOKENS = ".token_adapter.trainable_tokens_delta"
BELOW = ".base_layer"  # the base's layer in an adapted one

# Settings that change what an adapter computes or what its base is, and that we do not read.
NOT_READ = (
    *("arrow_config", "enable_lora", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config"),
)
# Settings that we read, or that no longer matter once an adapter is trained.
READ = (
    *(
        "alora_invocation_tokens",
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
    ),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights"),
    *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
    *("trainable_token_indices", "use_dora", "use_rslora"),
)
# Starts that PEFT subtracts from the base's weights each time it loads them.
OTHER_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")


def unreadable(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of PEFT's that cannot be honoured."""
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
    """Return the settings of PEFT's whose type does not suit its rules."""
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


def targets_of(
    config: Mapping[str, Any], paths: Iterable[str], known: Collection[str] | None = None
) -> list[str]:
    """Return our targets for the modules that PEFT's settings select.

    paths: of the modules with tensors. They are the targets if no pattern says the same (all-linear
    with exceptions, the head that is tied to an embedding). known: of all the base's layers, if the
    base is there; PEFT ignores names of others, and our targets would mean stacks of experts too.
    """
    targets = config["target_modules"]
    if targets is None and config.get("target_parameters"):
        targets = []
    if config.get("ensure_weight_tying"):
        return sorted(paths)  # among which is the head, where the embedding is adapted
    exclusion = _exclusion(config)
    if known is not None and not isinstance(targets, str):
        missing = names_without(targets, known)
        targets = [name for name in targets if name not in missing] or targets
    if isinstance(targets, str):
        # PEFT matches a string against the whole path.
        if targets == "all-linear":
            return sorted(paths) if exclusion else ["all"]
        return [f"re:^{exclusion}(?:{targets})$"]
    if not exclusion and not config.get("layers_pattern"):
        return sorted(targets)
    names = "|".join(map(re.escape, sorted(targets)))
    return [f"re:^{exclusion}{_in_layers(config)}(?:.*\\.)?(?:{names})$"] if names else []


def names_without(names: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Return those of PEFT's target names that are the end of none of the paths."""
    return {*names} - {end for path in paths for end in _ends(path)}


def layers_of(config: Mapping[str, Any]) -> str | None:
    """Return the slices of blocks that PEFT's settings select; None without, or with a pattern."""
    blocks = _blocks(config)
    return ",".join(map(str, blocks)) if blocks and not config.get("layers_pattern") else None


def excluded(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Return a problem for each module that has tensors although the settings exclude it.

    Raises ConfigError for a pattern that takes too long to match.
    """
    problems, matcher = [], Matcher()
    for name in ("exclude_modules", "modules_to_save"):
        if lookahead := _exclusion({name: config.get(name)}):
            problems += [
                f"{name} leaves out {path}, but there are tensors of it"
                for path in paths
                if not matcher.within(f"re:^{lookahead}", path)
            ]
    return problems


def matching(patterns: Any, paths: Sequence[str]) -> Any:
    """Return the patterns that match the end of a path; PEFT ignores the others.

    A value that is no map is returned unchanged, and refused later. Raises ConfigError for an
    invalid pattern.
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
    """Return whether a weight belongs to a module that modules_to_save names."""
    steps = path.split(".")[:-1]
    modules = [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
    return any(module.endswith(name) for module in modules for name in names)


def is_bias(path: str) -> bool:
    """Return whether a weight is a bias."""
    return path.rpartition(".")[2] == "bias"


def tokens_named(config: Mapping[str, Any]) -> dict[str, list[int]] | list[int]:
    """Return the tokens with trained rows: by name of a layer, or a list for the embedding.

    Raises TypeError if the setting is neither.
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


def _ends(path: str) -> Iterator[str]:
    """Yield a path, and what is left of it behind each of its dots."""
    while path:
        yield path
        path = path.partition(".")[2]


def _exclusion(config: Mapping[str, Any]) -> str:
    """Return a lookahead that fails on paths that PEFT leaves out."""
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
    """Return a lookahead that fails on paths in blocks that layers_to_transform does not have.

    The first number after the first of the layers' names counts.
    """
    blocks, names = _blocks(config), config.get("layers_pattern")
    if not names or not blocks:
        return ""
    names = [names] if isinstance(names, str) else names
    first = "|".join(rf"(?:|.*?\.){name}\.(?=\d+\.)" for name in names)
    numbers = "|".join(re.escape(str(block)) for block in blocks)
    return rf"(?=(?>{first})(?:{numbers})\.)"


def _blocks(config: Mapping[str, Any]) -> list[Any]:
    blocks = config.get("layers_to_transform")
    return blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]


def _no_patterns(config: Mapping[str, Any]) -> list[str]:
    """Return the settings that PEFT takes as patterns and that are not valid ones."""
    patterns = []
    for name in ("exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(name)
        if isinstance(value, str):
            patterns.append(value)
        elif name != "exclude_modules":  # whose lists are names, not patterns
            patterns += value or []
    return pattern_problems(patterns)


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
