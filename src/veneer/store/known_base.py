"""What formats need to know of a base and cannot learn from an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from veneer.methods.targets import Layer, adaptable_layers


@dataclass(frozen=True)
class KnownBase:
    """A base's configuration, and its layers by path: which are embeddings, and in which block."""

    config: PretrainedConfig
    layers: Mapping[str, Layer]
    embedding: str  # the input embedding's path
    modules: frozenset[str]  # the paths of all modules, of whatever kind

    @classmethod
    def of(cls, model: PreTrainedModel) -> KnownBase:
        """Return what a model tells of itself; one on the meta device tells as much."""
        embedding, paths = model.get_input_embeddings(), dict(model.named_modules())
        path = next((path for path, module in paths.items() if module is embedding), "")
        layers = {layer.path: layer for layer in adaptable_layers(model)}
        return cls(model.config, layers, path, frozenset(paths))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's own weight."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @property
    def blocks(self) -> int:
        """How many transformer blocks there are."""
        found = [layer.block for layer in self.layers.values() if layer.block is not None]
        return 1 + max(found, default=-1)

    def short_names(self, paths: set[str]) -> tuple[str, ...]:
        """Return last names where these say exactly which layers are meant, and whole paths if not.

        Others' readers look at every module that bears a name.
        """
        names = {path.rpartition(".")[2] for path in paths}
        same = {path for path in self.modules if path.rpartition(".")[2] in names}
        return tuple(sorted(names if same == paths else paths))
