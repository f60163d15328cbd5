"""PEFT's rules: which layers its settings name, and what a key in its file belongs to.

Patterns are PEFT's own regular expressions, matched as it matches them (check_target_module_exists
in peft/tuners/tuners_utils.py, set_additional_trainable_modules in peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.adapter.patterns import Matcher, pattern_problems
from veneer.formats.parts import BIAS, EMBEDDING, LINEAR, MAGNITUDE

PREFIX = "base_model.model."
# Our tensor's name: how PEFT's key ends. Embeddings and magnitudes have no `.weight` there.
ENDINGS = {name: f"{name}.weight" for name in LINEAR} | {name: name for name in EMBEDDING}
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
# Parameters of one module are nested in PEFT's file in the order in which the module has them; this
# is the order in all of transformers' stacks of experts.
ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias"),
    *("down_proj", "down_proj_bias"),
)


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
    """Return what of PEFT's settings is of a kind that none of its rules could be followed by."""
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
    wanted = config["target_modules"]
    if wanted is None and config.get("target_parameters"):
        wanted = []
    if config.get("ensure_weight_tying"):
        return sorted(paths)  # among which is the head, where the embedding is adapted
    excluded = _excluded(config)
    if isinstance(wanted, str):
        # PEFT matches a string against the whole path.
        if wanted == "all-linear":
            return sorted(paths) if excluded else ["all"]
        return [f"re:^{excluded}(?:{wanted})$"]
    if not excluded and not config.get("layers_pattern"):
        return sorted(wanted)
    names = "|".join(map(re.escape, sorted(wanted)))
    return [f"re:^{excluded}{_in_layers(config)}(?:.*\\.)?(?:{names})$"] if names else []


def layers_of(config: Mapping[str, Any]) -> str | None:
    """Return the slices of blocks that PEFT's settings name, or None where a pattern says it."""
    blocks = config.get("layers_to_transform")
    if blocks is None or blocks == [] or config.get("layers_pattern"):
        return None
    return ",".join(str(b) for b in (blocks if isinstance(blocks, list) else [blocks]))


def left_out(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Return which modules, of which there are tensors, the settings keep from being adapted.

    Raises ConfigError for a pattern that takes too long to match.
    """
    problems, matcher = [], Matcher()
    for name in ("exclude_modules", "modules_to_save"):
        if wanted := _excluded({name: config.get(name)}):
            problems += [
                f"{name} leaves out {path}, of which there are tensors"
                for path in paths
                if not matcher.within(f"re:^{wanted}", path)
            ]
    return problems


def matching(patterns: Any, paths: Sequence[str]) -> Any:
    """Return the patterns that match the end of a path: PEFT passes over the others.

    What is no map is returned as it is, to be refused. Raises ConfigError for what is no pattern.
    """
    if not isinstance(patterns, dict):
        return patterns
    matcher = Matcher()
    return {
        pattern: value
        for pattern, value in patterns.items()
        if any(matcher.at_end(pattern, path) for path in paths)
    }


def is_saved(config: Mapping[str, Any], path: str) -> bool:
    """Return whether a weight belongs to a module that modules_to_save names."""
    parts = path.split(".")[:-1]
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    names = config.get("modules_to_save") or []
    return any(module.endswith(name) for module in modules for name in names)


def parameters_at(config: Mapping[str, Any], owner: str) -> list[str]:
    """Return the names of the parameters of `owner` that target_parameters names, in order."""
    names = {
        leaf
        for target in config.get("target_parameters") or []
        if f".{owner}.{(leaf := target.rpartition('.')[2])}".endswith(f".{target}")
    }
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else -1, name))


def named_parameters(
    config: Mapping[str, Any], modules: Sequence[str], problems: list[str], matcher: Matcher
) -> dict[str, str]:
    """Return the path of the parameter that each module's tensors belong to, for those that
    target_parameters names.

    modules: as in the file, where `experts.base_layer` is what lies below `experts`. The last
    parameter is the outermost. Raises ConfigError for a pattern that takes too long to match.
    """
    found: dict[str, str] = {}
    matcher = Matcher()
    owners: dict[str, list[str]] = {}
    for module in modules if config.get("target_parameters") else []:
        owners.setdefault(module.replace(".base_layer", ""), []).append(module)
    for owner, levels in sorted(owners.items()):
        names = parameters_at(config, owner)
        if not names or (len(levels) == 1 and _targets_module(config, owner, matcher)):
            continue
        unknown = [name for name in names if name not in ORDER]
        if len(names) != len(levels):
            problems.append(
                f"target_parameters names {len(names)} parameters of {owner}, but there are "
                f"tensors for {len(levels)}"
            )
        elif len(names) > 1 and unknown:
            problems.append(
                f"target_parameters names {' and '.join(names)} of {owner}, and which tensors are "
                "whose cannot be told"
            )
        else:
            levels.sort(key=len)
            found |= {level: f"{owner}.{n}" for level, n in zip(levels, names[::-1], strict=True)}
    for target in config.get("target_parameters") or []:
        if not any(f".{path}".endswith(f".{target}") for path in found.values()):
            problems.append(f"target_parameters names {target!r}, for which there are no tensors")
    return found


def is_bias(path: str) -> bool:
    """Return whether a weight is a bias."""
    return path.rpartition(".")[2] == "bias"


def tokens_named(config: Mapping[str, Any]) -> dict[str, list[int]] | list[int]:
    """Return the words with rows of their own: for each name of a layer, or for the embedding.

    Raises TypeError where the setting is neither.
    """
    indices = config.get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    for ids in lists:
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise TypeError(f"trainable_token_indices is {indices!r}, but must be lists of numbers")
    return indices


def _targets_module(config: Mapping[str, Any], path: str, matcher: Matcher) -> bool:
    wanted = config.get("target_modules") or []
    if isinstance(wanted, str):
        return matcher.within(f"re:^(?:{wanted})$", path)
    return any(f".{path}".endswith(f".{name}") for name in wanted)


def _excluded(config: Mapping[str, Any]) -> str:
    """Return a pattern that fails in front of paths which PEFT leaves out."""
    exclude, saved = config.get("exclude_modules"), config.get("modules_to_save")
    pattern = ""
    if isinstance(exclude, str) and exclude:
        pattern += f"(?!(?:{exclude})$)"
    elif exclude:
        pattern += f"(?!(?:.*\\.)?(?:{'|'.join(map(re.escape, sorted(exclude)))})$)"
    if saved:  # PEFT takes these names as patterns here
        pattern += f"(?!(?:.*\\.)?(?:{'|'.join(saved)})(?:\\..*)?$)"
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


def experts_apart(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (experts, rank, in) and B (experts, out, rank) from PEFT's A (experts · rank, in)
    and B (out, rank · experts); of a matrix, A (rank, in) and B (out, rank) as they are."""
    experts = len(A) // rank
    if A.ndim != 2 or B.ndim != 2 or experts < 2 or len(A) % rank or B.shape[1] != len(A):
        return A, B  # a matrix, or misshapen, which is seen later
    B = B.view(len(B), rank, experts).permute(2, 0, 1)
    return A.view(experts, rank, -1), B.contiguous()


def experts_together(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT keeps them: the inverse of `experts_apart`."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
