"""The base's weights, measured: ‖W‖, beside which a change of W is small or large."""

from __future__ import annotations

import math
from threading import Lock
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.models.fingerprint import base_parameters
from veneer.quant.stack import QuantizedStack, quantized_weights
from veneer.quant.weight import QuantizedWeight

Weight: TypeAlias = Tensor | QuantizedWeight | QuantizedStack

NUMBERS_AT_ONCE = 2**22  # that are copied to float32: 17 MB


class BaseWeights:
    """The weights of a model that is served, for any thread. They never change, so each is measured
    once, when it is first asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        dense = base_parameters(model, every_name=True)
        self._weights: dict[str, Weight] = {
            **{name.removesuffix(".weight"): weight for name, weight in dense.items()},
            **{p.replace(".original", ""): w for p, w in quantized_weights(model).items()},
        }
        self._norms: dict[str, float | None] = {}
        self._lock = Lock()

    def norm(self, path: str) -> float | None:
        """Return ‖W‖ of a layer, an embedding or a parameter; None for what is not in the base."""
        with self._lock, torch.no_grad():
            if path not in self._norms:
                weight = self._weights.get(path)
                self._norms[path] = None if weight is None else _norm(weight)
            return self._norms[path]


def _norm(weight: Weight) -> float:
    if isinstance(weight, QuantizedStack):
        return math.hypot(*(_norm(weight.expert(e)) for e in range(len(weight))))
    pieces = (
        (block for _, block in weight.blocks())
        if isinstance(weight, QuantizedWeight)
        else weight.reshape(-1).split(NUMBERS_AT_ONCE)
    )
    return math.hypot(*(float(piece.float().norm()) for piece in pieces))
