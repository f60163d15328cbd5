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

from veneer.adapter.patterns import Matcher
from veneer.errors import AdapterError
from veneer.formats.peft.rules import BELOW, targets_module

# The order of parameters in every module of transformers' that holds stacks of experts.
ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias"),
    *("down_proj", "down_proj_bias"),
)


def nested_keys(paths: Iterable[str]) -> dict[str, str]:
    """Return, by each parameter's path, the module that has its tensors in PEFT's file.

    Raises AdapterError for parameters of one module if ORDER does not have them.
    """
    owners: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        owner, _, name = path.rpartition(".")
        owners[owner].append(name)
    keys = {}
    for owner, names in owners.items():
        if len(names) > 1 and (unknown := [name for name in names if name not in ORDER]):
            raise AdapterError(
                f"PEFT could not tell the tensors of {owner}'s parameters apart "
                f"({', '.join(unknown)}); merge the adapter, or write it natively."
            )
        for level, name in enumerate(reversed(_in_order(names))):
            keys[f"{owner}.{name}"] = owner + BELOW * level
    return keys


def parameter_paths(
    config: Mapping[str, Any], modules: Sequence[str], problems: list[str]
) -> dict[str, str]:
    """Return the parameter's path by each module whose tensors belong to one of target_parameters,
    and add to `problems` what does not fit.

    modules: paths in the file, such as `experts` and `experts.base_layer`. Raises ConfigError for a
    pattern that takes too long to match.
    """
    targets = config.get("target_parameters") or []
    paths: dict[str, str] = {}
    matcher = Matcher()
    owners: dict[str, list[str]] = defaultdict(list)
    for module in modules if targets else []:
        owners[module.replace(BELOW, "")].append(module)
    for owner, levels in sorted(owners.items()):
        names = _parameters_of(owner, targets)
        if not names or (len(levels) == 1 and targets_module(config, owner, matcher)):
            continue
        if len(names) != len(levels):
            problems.append(
                f"target_parameters names {len(names)} parameters of {owner}, but there are "
                f"tensors for {len(levels)}"
            )
        elif len(names) > 1 and not {*names} <= {*ORDER}:
            problems.append(
                f"target_parameters names {' and '.join(names)} of {owner}, and their tensors "
                "cannot be told apart"
            )
        else:
            levels.sort(key=len)
            names.reverse()
            paths |= {level: f"{owner}.{n}" for level, n in zip(levels, names, strict=True)}
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in paths.values()):
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


def _parameters_of(owner: str, targets: Iterable[str]) -> list[str]:
    """Return the names of the parameters of `owner` that target_parameters names, in order."""
    return _in_order(
        {
            name
            for target in targets
            if f".{owner}.{(name := target.rpartition('.')[2])}".endswith(f".{target}")
        }
    )


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else -1, name))
