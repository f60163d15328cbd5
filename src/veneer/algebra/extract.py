"""Extract an adapter from a full fine-tune: the change of each weight, cut to a rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.targets import describe_base
from veneer.algebra.change import Change, LayerFit, energy_of, rank_over, rejoined, state_of
from veneer.algebra.config import ExtractConfig
from veneer.errors import AdapterError, ModelError, joined
from veneer.formats.capture import named_paths
from veneer.formats.state import AdapterState, shortest_names
from veneer.lowrank.formula import Factors
from veneer.lowrank.spectrum import truncated
from veneer.models.description import Layer
from veneer.models.device import resolve_device
from veneer.models.fingerprint import Marks, fingerprint
from veneer.models.load import open_base
from veneer.models.source import Source

# A fine-tune changes weights by a few per cent of their size; models that were trained separately
# differ by more than their size.
FOREIGN = 0.5


@dataclass(frozen=True)
class UncoveredWeight:
    """A changed weight that the adapter does not cover."""

    name: str
    norm: float  # ‖ΔW‖
    relative: float  # ‖ΔW‖ / ‖W‖


@dataclass(frozen=True)
class Extracted:
    """An adapter extracted from a fine-tune, how much of the change it holds, and notices."""

    state: AdapterState
    layers: tuple[LayerFit, ...]
    uncovered: tuple[UncoveredWeight, ...]
    norm: float  # ‖ΔW‖ over all weights
    relative: float  # ‖ΔW‖ / ‖W‖ over all weights
    notices: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """The share of ‖ΔW‖² over the layers of the adapter that it holds."""
        return energy_of(self.layers)

    @property
    def uncovered_share(self) -> float:
        """The share of ‖ΔW‖² over all weights that lies in the uncovered ones."""
        return sum(weight.norm**2 for weight in self.uncovered) / self.norm**2

    # The names of earlier versions.
    left_out = property(lambda self: self.uncovered)
    left_out_share = property(lambda self: self.uncovered_share)


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    expert_rank: int | None = None,
    energy: float | None = None,
    embeddings: bool = False,
    force: bool = False,
    device: str | torch.device = "auto",
) -> Extracted:
    """Return the adapter over `base` that is nearest to the change from `base` to `tuned`.

    Layer by layer, s B A is W_tuned − W_base cut to a rank, or to the smallest rank that keeps a
    share `energy` of ‖ΔW‖² in each layer. Linear layers and stacks of experts are adapted, and with
    `embeddings` embeddings too, with a tied head; other changed weights are reported. Weights are
    read one by one. Each expert is cut to `expert_rank`, or rank / number of experts, at least 1.
    A base of a wider dtype is first rounded to the tuned one's, as it was when tuning began: tuning
    did not learn that rounding. Changes are decomposed on `device`, one weight at a time.

    Raises ConfigError for impossible settings, ModelError for models that cannot be read or whose
    weights have different names or shapes, and AdapterError if `tuned` is no fine-tune of `base`
    (unless `force`) or changed no layer.
    """
    config = ExtractConfig(rank, expert_rank, energy, embeddings)
    on = resolve_device(device)
    before, tokenizer, notices = open_base(base)
    after, their_tokenizer, more = open_base(tuned)
    _check_shapes(before, after)
    if not force:
        _check_settings(before, after, tokenizer, their_tokenizer)
    skeleton, marks = before.skeleton, Marks(before.skeleton)
    owners = _owners(skeleton, embeddings=config.embeddings)
    changes: dict[str, Change] = {}
    fits: list[LayerFit] = []
    uncovered: list[UncoveredWeight] = []
    changed = size = 0.0
    rounded = False
    for name in before.names:
        old, new = before.read(name), after.read(name)
        marks.see(name, old)
        if not new.is_floating_point():
            continue  # a mask, or another constant of the architecture
        rounded |= _is_wider(old, new)
        old = (old.to(new.dtype) if _is_wider(old, new) else old).to(on, torch.float32)
        delta = new.to(on, torch.float32) - old
        norm, own_size = float(delta.norm()), float(old.norm())
        changed, size = changed + norm**2, size + own_size**2
        if not math.isfinite(norm):
            raise ModelError(f"{name} has values that are not finite numbers.")
        if not norm:
            continue
        if name not in owners:
            uncovered.append(UncoveredWeight(name, norm, norm / own_size if own_size else math.inf))
            continue
        cut = [_cut(name, matrix, config, owners[name][0].experts) for matrix in _matrices(delta)]
        for layer in owners[name]:
            # Conv1D, embeddings and some experts are stored as (in, out): there B A is transposed.
            turned = [((B.T, A.T) if layer.transposed else (A, B), fit) for (A, B), fit in cut]
            change, fit = rejoined(
                layer.path, turned, experts=layer.experts, kind=layer.factor_kind
            )
            changes[layer.path] = change
            fits.append(fit)
    relative = (changed / size) ** 0.5 if size else 0.0
    if relative > FOREIGN and not force:
        raise AdapterError(
            f"The weights of {tuned} differ from those of {base} by {relative:.0%} of their size, "
            "as if the two were trained apart: this is no fine-tune of that base (force overrides "
            "this)."
        )
    if not changes:
        raise AdapterError(
            f"No layer of {tuned} that can have an adapter differs from {base}'s: there is nothing "
            "to extract."
        )
    skeleton.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    state = state_of(
        changes,
        targets=shortest_names(set(changes), named_paths(skeleton)),
        base_name=str(base),
        base_fingerprint=fingerprint(skeleton, tokenizer),
    )
    rounding = (f"The weights of {base} were rounded to the dtype of {tuned} before comparing.",)
    return Extracted(
        state,
        tuple(fits),
        tuple(uncovered),
        changed**0.5,
        relative,
        (*notices, *more, *(rounding if rounded else ())),
    )


def _matrices(delta: Tensor) -> Iterable[Tensor]:
    return delta if delta.ndim == 3 else [delta]


def _cut(name: str, delta: Tensor, config: ExtractConfig, experts: int) -> tuple[Factors, LayerFit]:
    rank = rank_over(experts, config.rank, config.expert_rank)
    factors, energy = truncated(delta, rank=rank, energy=config.energy)
    A, B = (factor.cpu() for factor in factors)
    return (A, B), LayerFit(name, len(A), float(delta.norm()), energy)


def _owners(skeleton: PreTrainedModel, *, embeddings: bool) -> dict[str, list[Layer]]:
    """Return the layers that share each weight, by its name, if all of them can have an adapter."""
    names = {id(weight): name for name, weight in skeleton.named_parameters()}
    owners: dict[str, list[Layer]] = defaultdict(list)
    for layer in describe_base(skeleton).layers:
        if layer.is_linear or layer.is_stack or layer.kind == "embedding":
            weight = layer.parameter or "weight"
            owners[names[id(getattr(layer.module, weight))]].append(layer)
    return {
        name: layers
        for name, layers in owners.items()
        if embeddings or not any(layer.kind == "embedding" for layer in layers)
    }


def _is_wider(old: Tensor, new: Tensor) -> bool:
    return torch.finfo(old.dtype).bits > torch.finfo(new.dtype).bits


def _check_shapes(before: Source, after: Source) -> None:
    """Raise ModelError, listing each weight that one model lacks or that has another shape."""
    ours, theirs = (dict(_shapes(source)) for source in (before, after))
    problems = [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} in the base"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if problems:
        raise ModelError(f"The weights of the two models do not match: {joined(problems)}.")


def _shapes(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    state = source.skeleton.state_dict()
    for name in source.names:
        yield name, tuple(state[name].shape)


def _check_settings(
    before: Source,
    after: Source,
    tokenizer: PreTrainedTokenizerBase,
    their_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise AdapterError if the two have other settings or another vocabulary."""
    keys = {"settings": "config", "vocabularies": "tokenizer"}
    ours, theirs = (
        fingerprint(_marked(source), tokens)
        for source, tokens in ((before, tokenizer), (after, their_tokenizer))
    )
    differing = [name for name, key in keys.items() if ours[key] != theirs[key]]
    if differing:
        raise AdapterError(
            f"The {' and '.join(differing)} of the two models differ: this is no fine-tune of that "
            "base (force overrides this)."
        )


def _marked(source: Source) -> PreTrainedModel:
    """Return the skeleton, marked with the fingerprint of its settings alone."""
    source.skeleton.veneer_marks = Marks(source.skeleton).fingerprint()  # type: ignore[assignment]
    return source.skeleton
