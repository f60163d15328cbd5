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

    @classmethod
    def of(cls, model: PreTrainedModel) -> KnownBase:
        """Return what a model tells of itself; one on the meta device tells as much."""
        embedding = model.get_input_embeddings()
        path = next((path for path, module in model.named_modules() if module is embedding), "")
        return cls(model.config, {layer.path: layer for layer in adaptable_layers(model)}, path)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's own weight."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @property
    def blocks(self) -> int:
        """How many transformer blocks there are."""
        found = [layer.block for layer in self.layers.values() if layer.block is not None]
        return 1 + max(found, default=-1)
