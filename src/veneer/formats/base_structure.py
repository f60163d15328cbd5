"""What formats need to know of a base: its layers, its embedding and its blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig, PreTrainedModel

from veneer.adapter.targets import describe_base
from veneer.errors import AdapterError, ModelError
from veneer.formats.capture import named_paths
from veneer.formats.state import shortest_names
from veneer.models.description import Layer, ModelDescription
from veneer.models.load import load_skeleton


@dataclass(frozen=True)
class BaseStructure:
    """A base's structure, looked up on demand; `model` may be on the meta device."""

    model: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers that can be adapted, by path."""
        return {layer.path: layer for layer in self._description.layers if layer.is_adaptable}

    @cached_property
    def matrices(self) -> dict[str, Layer]:
        """The single parameters that can be adapted, such as stacks of experts, by path."""
        return {layer.path: layer for layer in self._description.layers if layer.is_matrix}

    @cached_property
    def parameters(self) -> dict[str, list[str]]:
        """The names of the parameters of each module that is no known kind of layer, in order."""
        names: dict[str, list[str]] = defaultdict(list)
        for layer in self._description.layers:
            if layer.parameter is not None:
                names[layer.path.rpartition(".")[0]].append(layer.parameter)
        return dict(names)

    @cached_property
    def embedding(self) -> str:
        """The path of the input embedding; empty where there is none."""
        try:
            embedding = self.model.get_input_embeddings()
        except NotImplementedError:  # a model that takes no tokens
            return ""
        modules = self.model.named_modules()
        return next((path for path, module in modules if module is embedding), "")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's own weight."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @property
    def blocks(self) -> int:
        """How many transformer blocks there are."""
        return self._description.depth

    @cached_property
    def _description(self) -> ModelDescription:
        return describe_base(self.model)


def targets_for(paths: set[str], base: BaseStructure | None) -> tuple[str, ...]:
    """Return targets for the layers at `paths`: last names, if the base is there to check them."""
    return tuple(sorted(paths)) if base is None else shortest_names(paths, named_paths(base.model))


def structure_of(name: str) -> BaseStructure:
    """Return the structure of the base that an adapter names; no weight of it is read.

    Raises AdapterError where there is no such base.
    """
    try:
        return BaseStructure(load_skeleton(name))
    except ModelError as error:
        raise AdapterError(
            f"The base that the adapter names, {name!r}, cannot be read: {str(error).rstrip('.')}. "
            "Name it (--base, or MODEL)."
        ) from error
