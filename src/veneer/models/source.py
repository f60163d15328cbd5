"""Read a base's dense weights one at a time, so that memory never holds all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.models.gguf_tensors import GGUFTensors
from veneer.models.stored_names import Piece, stored_names
from veneer.quant.mapped import map_tensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Source:
    """The weights of a base by the skeleton's own names, in the order of its layers.

    identity: a hash of the files' names, sizes and times. rounded: the weights that the files
    hold quantized.
    """

    skeleton: PreTrainedModel  # on the meta device
    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    identity: str
    read_expert: Callable[[str, int], Tensor] | None = None
    rounded: frozenset[str] = frozenset()

    def expert(self, name: str, e: int) -> Tensor:
        """Return one expert of a stack, as the skeleton keeps it."""
        return self.read(name)[e] if self.read_expert is None else self.read_expert(name, e)

    @classmethod
    def of_model(
        cls, skeleton: PreTrainedModel, model: PreTrainedModel, place: Path | None = None
    ) -> Source:
        """Return the weights of a model in memory that was read from `place`."""
        state = model.state_dict()
        files = [] if place is None else [place] if place.is_file() else list(place.glob("*.*"))
        return cls(skeleton, untied(skeleton), state.__getitem__, identity_of(files))


def open_source(place: Path, skeleton: PreTrainedModel, *, mapped: bool = False) -> Source | None:
    """Return the weights of a .gguf file or a directory of safetensors.

    mapped: safetensors stay in their file, so that of a slice no more is read. None if only
    transformers can map them: other files, other names, or two different weights in the files that
    the configuration ties into one.
    """
    names = untied(skeleton)
    if place.suffix == ".gguf":
        tensors = GGUFTensors(place, skeleton)
        if not set(names) <= tensors.names:
            return None
        last: dict[str, Tensor] = {}  # a stack is read once for all of its experts

        def expert_in_gguf(name: str, e: int) -> Tensor:
            if name not in last:
                last.clear()
                last[name] = tensors.read(name)
            return last[name][e]

        identity, rounded = identity_of([place]), tensors.names_in_blocks()
        return Source(skeleton, names, tensors.read, identity, expert_in_gguf, rounded)
    files = model_files(place)
    file_of = {name: file for file in files for name in _tensor_names(file)}
    prefix = f"{skeleton.base_model_prefix}."
    stored = {name: name if name in file_of else name.removeprefix(prefix) for name in names}
    pieces: dict[str, tuple[tuple[Piece, ...], ...]] = {}
    if not set(stored.values()) <= set(file_of):
        # transformers renames them, or stacks experts that the files have one by one.
        conventions = stored_names(skeleton)
        for name in [name for name, own in stored.items() if own not in file_of]:
            own = conventions.whole.get(name, name)
            stored[name] = own if own in file_of else own.removeprefix(prefix)
            if stored[name] not in file_of:
                pieces[name] = _in_files(conventions.experts.get(name, ()), prefix, file_of)
                if not pieces[name]:
                    return None
    opened = {file: safe_open(file, "pt") for file in files}
    in_place = (
        {name: t for file in files for name, t in map_tensors(file).items()} if mapped else {}
    )

    def read(name: str) -> Tensor:
        if name in pieces:
            return torch.stack([read_expert(name, e) for e in range(len(pieces[name]))])
        own = stored.get(name, name)
        return in_place[own] if mapped else opened[file_of[own]].get_tensor(own)

    def read_expert(name: str, e: int) -> Tensor:
        if name not in pieces:
            own = stored[name]
            return opened[file_of[own]].get_slice(own)[e]
        owner = skeleton.get_submodule(name.rpartition(".")[0])
        tensors = [opened[file_of[p.name]].get_tensor(p.name) for p in pieces[name][e]]
        expert = torch.empty(sum(map(len, tensors)), tensors[0].shape[1], dtype=tensors[0].dtype)
        for piece, tensor in zip(pieces[name][e], tensors, strict=True):
            expert[piece.rows] = tensor
        return expert.T if getattr(owner, "is_transposed", False) else expert

    for name, twin in _ties(skeleton).items():
        if name in file_of:
            one, other = read(name), read(twin)
            if one.dtype != other.dtype or not torch.equal(one, other):
                return None
    return Source(skeleton, names, read, identity_of(files), read_expert)


def _in_files(
    experts: Sequence[Sequence[Piece]], prefix: str, file_of: Mapping[str, Path]
) -> tuple[tuple[Piece, ...], ...]:
    """Return the pieces of a stack by the names that the files have; none where one is missing."""
    named = tuple(
        tuple(
            piece if piece.name in file_of else Piece(piece.name.removeprefix(prefix), piece.rows)
            for piece in pieces
        )
        for pieces in experts
    )
    whole = all(piece.name in file_of for pieces in named for piece in pieces)
    return named if whole else ()


def model_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model: the only one, or those that its index names.

    Other files beside them are ignored, as in transformers. Raises ModelError for an index that
    cannot be read.
    """
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(directory / name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read as a list of files ({error}).") from error


def adapter_file(directory: Path) -> Path | None:
    """Return the first file of a model that holds an adapter's tensors too, as it does where
    `save_pretrained` wrote an adapted model. None where there is none, or it cannot be read."""
    with suppress(ModelError):
        for file in model_files(directory):
            if any(".adapters." in name and ".lora_" in name for name in _tensor_names(file)):
                return file
    return None


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:  # safetensors' errors are of many kinds
        raise ModelError(f"{file} cannot be read as safetensors ({error}).") from error


def identity_of(files: Sequence[Path]) -> str:
    stats = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def untied(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of all weights, without those that are tied to an earlier one."""
    tied = _ties(skeleton)
    return tuple(name for name in skeleton.state_dict() if name not in tied)


def _ties(skeleton: PreTrainedModel) -> dict[str, str]:
    """Return each tied weight's earlier name by its own."""
    first: dict[int, str] = {}
    ties = {}
    for name, weight in skeleton.named_parameters(remove_duplicate=False):
        if id(weight) in first:
            ties[name] = first[id(weight)]
        first.setdefault(id(weight), name)
    return ties
