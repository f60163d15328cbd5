"""Load bases that are published quantized: their blocks are the frozen weights, and stay in their
files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.errors import ModelError
from veneer.models.assemble import AnyWeight, assemble
from veneer.models.description import multiplies
from veneer.models.fingerprint import Marks
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.models.source import Source, identity_of, model_files, untied
from veneer.models.stored import read_ahead, weights_of
from veneer.quant.mapped import map_tensors
from veneer.quant.published import KEYS, is_quantized, published_experts, published_weight
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedWeight, dense


class PublishedFiles:
    """The weights of a directory, quantized where they are so there.

    Raises ModelError for files that cannot be read.
    """

    def __init__(self, directory: Path, skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
        self.skeleton, self.dtype = skeleton, dtype
        self._how: Mapping[str, Any] = skeleton.config.to_dict()["quantization_config"]
        self.files = model_files(directory)
        self._stored: dict[str, Tensor] = {}
        for file in self.files:
            try:
                self._stored |= map_tensors(file)
            except Exception as error:  # damage raises many kinds
                raise ModelError(
                    f"{file} cannot be read as a quantized model ({error!r})."
                ) from error
        self._layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._stored.items():
            path, _, key = name.rpartition(".")
            if key in KEYS:
                self._layers[path][key] = tensor
        stacks = (name.removesuffix("_blocks") for name in self._stored if name.endswith("_blocks"))
        layers = (f"{path}.weight" for path, layer in self._layers.items() if is_quantized(layer))
        self._names = {*self._stored, *stacks, *layers}

    def weights(self) -> Iterator[tuple[str, AnyWeight]]:
        """Yield every weight that the files hold, by its name in the skeleton."""
        for name, weight in weights_of(self.skeleton, self._names, self._read):
            owner = self.skeleton.get_submodule(name.rpartition(".")[0])
            is_layer = isinstance(owner, Conv1D) or (
                isinstance(owner, nn.Linear) and multiplies(owner)
            )
            # An embedding is read row by row, and a router is small.
            is_dense = isinstance(weight, QuantizedWeight) and not is_layer
            yield name, dense(weight) if is_dense else weight  # type: ignore[arg-type]

    def _read(self, name: str) -> AnyWeight:
        """Return what the files have under a name."""
        path, _, key = name.rpartition(".")
        layer = self._layers.get(path, {})
        try:
            if key == "weight" and is_quantized(layer):
                return published_weight(layer, self._how, self.dtype)
            experts = published_experts(name, self._stored, self._how, self.dtype)
        except Exception as error:  # of tensors that do not belong together
            raise ModelError(f"{name} cannot be read as a quantized weight: {error}.") from error
        if experts is None:
            return self._stored[name]
        owner = self.skeleton.get_submodule(path)
        return QuantizedStack(experts, transposed=bool(getattr(owner, "is_transposed", False)))

    def as_source(self) -> Source:
        """Return the weights as dense numbers, one at a time."""
        weights = dict(self.weights())

        def read(name: str) -> Tensor:
            weight = weights.get(name)
            if weight is None:
                raise ModelError(f"The model lacks the weight {name}.")
            if isinstance(weight, QuantizedStack):
                return weight.dense()
            owner = self.skeleton.get_submodule(name.rpartition(".")[0])
            is_turned = isinstance(weight, QuantizedWeight) and isinstance(owner, Conv1D)
            return dense(weight).T if is_turned else dense(weight)

        def read_expert(name: str, e: int) -> Tensor:
            return weights[name][e]  # type: ignore[index]

        quantized = (name for name, weight in weights.items() if not isinstance(weight, Tensor))
        return Source(
            self.skeleton,
            untied(self.skeleton),
            read,
            identity_of(self.files),
            read_expert,
            frozenset(quantized),
        )


def load_published(
    directory: Path,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> PreTrainedModel:
    """Return the model of a directory in a published format; its large tensors stay in their files,
    go to an accelerator, or are sharded over the processes of a world.

    Raises ModelError for damage.
    """
    weights, marks = PublishedFiles(directory, skeleton, dtype).weights(), Marks(skeleton)
    del skeleton.config.quantization_config
    seen = _seen(weights, skeleton, marks)
    model = assemble(skeleton, seen, dtype, to=to)
    model.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    read_ahead(model)
    return model


def _seen(
    weights: Iterator[tuple[str, AnyWeight]], skeleton: PreTrainedModel, marks: Marks
) -> Iterator[tuple[str, AnyWeight]]:
    """Yield weights, of whose numbers the fingerprint is taken: it is that of a dense base."""
    for name, weight in weights:
        if isinstance(weight, QuantizedStack):
            for e, expert in enumerate(weight.experts):
                marks.see(name, expert, expert=e, transposed=weight.transposed)
        else:
            owner = skeleton.get_submodule(name.rpartition(".")[0])
            marks.see(name, weight, transposed=isinstance(owner, Conv1D))
        yield name, weight
