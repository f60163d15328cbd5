"""Where PEFT's files have adapted parameters, such as stacks of experts, and in which shape.

PEFT wraps a module once for each of its target_parameters. The wrappers are nested, so that the
file has one parameter's tensors at `experts`, the next one's at `experts.base_layer`, and so on.
The last parameter in ORDER is the outermost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from veneer.adapter.patterns import Matcher
from veneer.errors import AdapterError
from veneer.formats.peft.rules import BELOW, targets_module

# The order of parameters in every module of transformers' that holds stacks of experts.
ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias"),
    *("down_proj", "down_proj_bias"),
)
ROUTER = "gate.weight"
# The last names of linear layers that PEFT takes for those of experts, by kind of mixture whose
# experts became stacks in transformers 5 (_MOE_TARGET_MODULE_MAPPING in PEFT 0.21's
# utils/transformers_weight_conversion.py). It then adapts the stacks, and no layer.
TAKEN = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
TAKEN_SOMEWHERE = frozenset().union(*TAKEN.values())


def taken_for_stacks(paths: Sequence[str], model_type: str | None) -> list[str]:
    """Return those of the layers that PEFT would take for stacks of experts by their last names.

    model_type: of the base; None where it is not known, so that a layer's path has to tell.
    """
    if model_type is None:
        is_mixture = any("expert" in path for path in paths)
        names = TAKEN_SOMEWHERE if is_mixture else frozenset()
    else:
        likes = {"mixtral": "mixtral", **_MODEL_TO_CONVERSION_PATTERN}
        names = TAKEN.get(likes.get(model_type, ""), frozenset())
    return [path for path in paths if path.rpartition(".")[2] in names]


def nested_keys(
    paths: Iterable[str], parameters: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """Return, by each parameter's path, the module that has its tensors in PEFT's file.

    parameters: the names of each module's parameters in the base's order, if the base is there.
    Raises AdapterError for parameters of one module whose order is not known.
    """
    owners: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        owner, _, name = path.rpartition(".")
        owners[owner].append(name)
    keys = {}
    for owner, names in owners.items():
        order = ORDER if parameters is None else parameters.get(owner, ())
        if len(names) > 1 and (unknown := [name for name in names if name not in order]):
            raise AdapterError(
                f"PEFT could not tell the tensors of {owner}'s parameters apart "
                f"({', '.join(unknown)}); merge the adapter, or write it natively."
            )
        for level, name in enumerate(reversed(_in_order(names, order))):
            keys[f"{owner}.{name}"] = owner + BELOW * level
    return keys


def parameter_paths(
    config: Mapping[str, Any],
    modules: Sequence[str],
    problems: list[str],
    parameters: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Return the parameter's path by each module whose tensors belong to one of target_parameters,
    and add to `problems` what does not fit.

    modules: paths in the file, such as `experts` and `experts.base_layer`. parameters: the names of
    each module's parameters in the base's order, if the base is there. Raises ConfigError for a
    pattern that takes too long to match.
    """
    targets = config.get("target_parameters") or []
    paths: dict[str, str] = {}
    matcher = Matcher()
    owners: dict[str, list[str]] = defaultdict(list)
    for module in modules if targets else []:
        owners[module.replace(BELOW, "")].append(module)
    for owner, levels in sorted(owners.items()):
        order = ORDER if parameters is None else parameters.get(owner, ORDER)
        names = _parameters_of(owner, targets, len(levels), order)
        if parameters is not None and owner in parameters:
            names = [name for name in names if name in order] or names
        if not names or (len(levels) == 1 and targets_module(config, owner, matcher)):
            continue
        if len(names) != len(levels):
            problems.append(
                f"target_parameters names {len(names)} parameters of {owner}, but there are "
                f"tensors for {len(levels)}"
            )
        elif len(names) > 1 and not {*names} <= {*order}:
            problems.append(
                f"target_parameters names {' and '.join(names)} of {owner}, and their tensors "
                "cannot be told apart"
            )
        else:
            levels.sort(key=len)
            names.reverse()
            paths |= {level: f"{owner}.{n}" for level, n in zip(levels, names, strict=True)}
    for target in targets:
        # PEFT adds the router, by a name that some mixtures do not have.
        if target != ROUTER and not any(
            f".{path}".endswith(f".{target}") for path in paths.values()
        ):
            problems.append(f"target_parameters names {target!r}, for which there are no tensors")
    return paths


def experts_apart(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (experts, rank, in) and B (experts, out, rank) from PEFT's A (experts · rank, in)
    and B (out, rank · experts); of a matrix, A (rank, in) and B (out, rank) as they are."""
    experts = len(A) // rank
    if A.ndim != 2 or B.ndim != 2 or experts < 2 or len(A) % rank or B.shape[1] != len(A):
        return A, B  # a matrix, or a wrong shape, which validate finds
    B = B.view(len(B), rank, experts).permute(2, 0, 1)
    return A.view(experts, rank, -1), B.contiguous()


def experts_together(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT stores them: the inverse of `experts_apart`."""
    if B.ndim == 2:
        return A, B
    A = A.expand(len(B), -1, -1)  # each expert has an A of its own in PEFT
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def _parameters_of(
    owner: str, targets: Iterable[str], levels: int, order: Sequence[str]
) -> list[str]:
    """Return the names of the parameters of `owner` that target_parameters names, in order.

    A name alone, such as down_proj, may be meant of every module, so that names with a part of the
    path come first where they are as many as the file has tensors for.
    """
    fitting = [
        (target.rpartition(".")[2], "." in target)
        for target in targets
        if f".{owner}.{target.rpartition('.')[2]}".endswith(f".{target}")
    ]
    exact = {name for name, has_path in fitting if has_path}
    names = exact if len(exact) == levels else {name for name, _ in fitting}
    return _in_order(names, order)


def _in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (order.index(name) if name in order else -1, name))
