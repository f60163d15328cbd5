"""The embedding over a quantized weight: a pass dequantizes only the rows of its tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from veneer.quant.weight import QuantizedWeight, destination


class QuantizedEmbedding(nn.Module):
    """Looks rows up in a quantized weight (tokens, dim), in place of the embedding `replaces`."""

    def __init__(self, quantized_weight: QuantizedWeight, replaces: nn.Embedding) -> None:
        super().__init__()
        self.quantized_weight = quantized_weight
        self.num_embeddings, self.embedding_dim = quantized_weight.shape
        self.padding_idx = replaces.padding_idx
        self._replaces = (replaces,)  # in a tuple, so that it is no submodule

    @property
    def weight(self) -> Tensor:
        """The weight (tokens, dim), dequantized anew at each access."""
        return self.quantized_weight.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.quantized_weight.rows(ids.reshape(-1))
        return rows.view(*ids.shape, self.embedding_dim)

    def to_dense(self) -> nn.Embedding:
        """Return the embedding that this one replaces, with the dequantized weight."""
        embedding = copy.copy(self._replaces[0])
        embedding._parameters = {"weight": nn.Parameter(self.weight, False)}
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.quantized_weight.label}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        # Codes keep their own dtype: only a change of device moves them.
        self.quantized_weight = self.quantized_weight.to(destination(fn, self.quantized_weight))
        return super()._apply(fn, recurse)
