"""The head of a model on the labelled rows alone, proven to give the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.kernels.cross_entropy import labelled_cross_entropy


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its decoder's output: with its output embeddings."""

    def loss(self, model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the labelled rows' losses; hidden (tokens, dim), labels (tokens,)."""
        module = model.get_output_embeddings()
        assert isinstance(module, nn.Module)
        return labelled_cross_entropy(hidden, labels, module)


def own_logits_and_head(
    model: PreTrainedModel, row: Example
) -> tuple[Tensor, Head | None, str | None]:
    """Return the model's own logits (tokens, vocab), and the head that gives them; or None and why
    no head does."""
    tokens = torch.tensor([row.tokens], device=model.device)
    own = model(input_ids=tokens, use_cache=False).logits[0]
    try:
        head: Any = model.get_output_embeddings()
        shortcut = head(model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state)[0]
    except Exception as error:  # whatever a foreign architecture raises, the slower way is open
        return own, None, described(error)
    # The same operations on the same numbers: anything but the last bit is another meaning, such
    # as a soft cap, which would hide within a loss.
    same_shape = shortcut.shape == own.shape
    if same_shape and torch.dist(shortcut.float(), own.float()) <= 1e-3 * own.norm():
        return own, Head(), None
    return own, None, "its head does more than multiply"


def described(error: Exception) -> str:
    """Return the kind of an error and its message."""
    return f"{type(error).__name__}: {error}"
