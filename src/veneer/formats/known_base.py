"""What formats need to know of a base and cannot learn from an adapter's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig, PreTrainedModel

from veneer.adapter.targets import Layer, adaptable_layers


@dataclass(frozen=True)
class KnownBase:
    """A base, of which the structure alone is asked: one on the meta device tells as much.

    Nothing is looked up before a format asks for it; most ask for nothing.
    """

    model: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers that can be adapted, by path."""
        return {layer.path: layer for layer in adaptable_layers(self.model)}

    @cached_property
    def embedding(self) -> str:
        """The path of the input embedding; empty where there is none."""
        try:
            embedding = self.model.get_input_embeddings()
        except NotImplementedError:  # a model that sees no words
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
        found = [layer.block for layer in self.layers.values() if layer.block is not None]
        return 1 + max(found, default=-1)

    def short_names(self, paths: set[str]) -> tuple[str, ...]:
        """Return last names where these say exactly which layers are meant, and whole paths if not.

        Others' readers look at every module that bears a name.
        """
        names = {path.rpartition(".")[2] for path in paths}
        every = (path for path, _ in self.model.named_modules())
        same = {path for path in every if path.rpartition(".")[2] in names}
        return tuple(sorted(names if same == paths else paths))
