"""A base's dense weights one at a time, so that it never has to stand in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.models import gguf


@dataclass(frozen=True)
class Source:
    """The weights of a base by the skeleton's own names, in the order of its layers."""

    skeleton: PreTrainedModel  # on the meta device
    names: tuple[str, ...]
    read: Callable[[str], Tensor]

    @classmethod
    def of_model(cls, skeleton: PreTrainedModel, model: PreTrainedModel) -> Source:
        """Return the weights of a model that stands in memory."""
        state = model.state_dict()
        return cls(skeleton, _untied(skeleton), state.__getitem__)


def open_source(place: Path, skeleton: PreTrainedModel) -> Source | None:
    """Return the weights of a .gguf file or a directory of safetensors.

    None where only transformers can tell which weight is which: other files, or other names.
    """
    if place.suffix == ".gguf":
        tensors = gguf.open_tensors(place, skeleton)
        return Source(skeleton, _untied(skeleton), lambda name: tensors[name]())
    files = sorted(place.glob("*.safetensors"))
    found = {name: file for file in files for name in tensor_names(file)}
    names, prefix = _untied(skeleton), f"{skeleton.base_model_prefix}."
    stored = {name: name if name in found else name.removeprefix(prefix) for name in names}
    if not set(stored.values()) <= set(found):
        return None
    opened = {file: safe_open(file, "pt") for file in set(found.values())}
    return Source(
        skeleton, names, lambda name: opened[found[stored[name]]].get_tensor(stored[name])
    )


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file. Raises ModelError if it is none."""
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:  # safetensors' errors are of many kinds
        raise ModelError(f"{file} cannot be read as safetensors ({error}).") from error


def _untied(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of all weights, those that are tied to another left out."""
    own = {name for name, _ in skeleton.named_parameters()}  # the first name of each
    tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - own
    return tuple(name for name in skeleton.state_dict() if name not in tied)
