"""The names under which files keep a model's weights, where transformers renames or stacks them.

Most files of mixtures keep each expert's gate, up and down as weights of their own, which
transformers stacks as it reads them, and takes apart as it writes. Here it takes apart a model of
tiny tensors in which every number is another, and the numbers say where each piece comes from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from veneer.models.description import keeps_experts

ROWS, COLUMNS = 4, 2  # of the tiny experts
SPAN = 2**20  # more than the numbers of a tiny stack
# The rows of an expert that a piece may be: all, the first or second half, every other one.
PIECES = (slice(0, 4), slice(0, 2), slice(2, 4), slice(0, 4, 2), slice(1, 4, 2))


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one expert (out, in), a weight of its own in the files."""

    name: str
    rows: slice

    @property
    def is_contiguous(self) -> bool:
        return self.rows.step in (None, 1)

    def scaled(self, scale: int) -> Piece:
        """Return the piece of an expert with `scale` times as many rows."""
        rows = self.rows
        first = rows.start * scale if self.is_contiguous else rows.start
        return Piece(self.name, slice(first, rows.stop * scale, rows.step))


@dataclass(frozen=True)
class StoredNames:
    """The names in files: of weights that are kept whole, and of the pieces of each expert.

    A weight that is in neither is changed in other ways, which only transformers knows.
    """

    whole: Mapping[str, str]
    experts: Mapping[str, tuple[tuple[Piece, ...], ...]]
    counts: Mapping[str, int]  # experts of each stack

    def own_pieces(self, name: str) -> tuple[tuple[Piece, ...], ...]:
        """Return the names of a stack's experts where no convention is known: each expert is the
        weight (out, in) of a linear layer `<module>.<expert>.<parameter>`."""
        owner, _, leaf = name.rpartition(".")
        return tuple(
            (Piece(f"{owner}.{e}.{leaf}.weight", slice(None)),) for e in range(self.counts[name])
        )

    def pieces(self, name: str) -> tuple[tuple[Piece, ...], ...]:
        """Return the pieces in which a stack's experts are quantized, in their rows' order."""
        experts = self.experts.get(name, ())
        if experts and all(piece.is_contiguous for pieces in experts for piece in pieces):
            return experts
        return self.own_pieces(name)


def stored_names(skeleton: PreTrainedModel) -> StoredNames:
    """Return the names under which a model's files keep its weights."""
    weights = skeleton.state_dict()
    owners = {name: skeleton.get_submodule(name.rpartition(".")[0]) for name in weights}
    stacks = {
        name: len(weight)
        for name, weight in weights.items()
        if weight.ndim == 3 and keeps_experts(owners[name])
    }
    numbers = list(weights)
    tiny = {
        name: _stack(number, stacks[name], owners[name])
        if name in stacks
        else torch.full((2,) * weights[name].ndim, number * SPAN)
        for number, name in enumerate(numbers)
    }
    whole: dict[str, str] = {}
    pieces_of: dict[str, dict[int, list[Piece]]] = {name: {} for name in stacks}
    for stored, tensor in _taken_apart(skeleton, tiny).items():
        name = numbers[int(tensor.reshape(-1)[0]) // SPAN]
        if torch.equal(tensor, tiny[name]):
            whole[name] = stored
        elif name in stacks and tensor.ndim == 2:
            e = int(tensor[0, 0]) % SPAN // (ROWS * COLUMNS)
            expert = _oriented(tiny[name], owners[name])[e]
            for rows in PIECES:
                if torch.equal(expert[rows], tensor):
                    pieces_of[name].setdefault(e, []).append(Piece(stored, rows))
    experts = {}
    for name, count in stacks.items():
        out = _oriented(weights[name], owners[name]).shape[1]
        by_expert = (pieces_of[name].get(e, ()) for e in range(count))
        pieces = [sorted(each, key=lambda piece: piece.rows.start) for each in by_expert]
        if out % ROWS == 0 and all(map(_is_whole, pieces)):
            experts[name] = tuple(tuple(p.scaled(out // ROWS) for p in each) for each in pieces)
    return StoredNames(whole, experts, stacks)


def _is_whole(pieces: Sequence[Piece]) -> bool:
    """Return whether pieces of a tiny expert are all of its rows, each once."""
    return sorted(row for piece in pieces for row in range(ROWS)[piece.rows]) == list(range(ROWS))


def _taken_apart(skeleton: PreTrainedModel, tiny: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as transformers would write them; as they are where it cannot so small."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return dict(revert_weight_conversion(skeleton, dict(tiny)))
    except Exception:  # whatever its operations make of such shapes
        return tiny
    finally:
        log.setLevel(level)


def _stack(number: int, experts: int, owner: nn.Module) -> Tensor:
    count = experts * ROWS * COLUMNS
    stack = number * SPAN + torch.arange(count).view(experts, ROWS, COLUMNS)
    return _oriented(stack, owner).contiguous()


def _oriented(stack: Tensor, owner: nn.Module) -> Tensor:
    """Turn a stack between (experts, out, in) and as its module keeps it."""
    return stack.transpose(1, 2) if getattr(owner, "is_transposed", False) else stack
