"""Models that make something else of their logits, under no name that a configuration has."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def changed(model: Any, how: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Let a model's logits be how(logits, hidden), hidden its decoder's output, and return it."""
    plain, hidden = model.forward, []
    model.get_decoder().register_forward_hook(
        lambda decoder, args, output: hidden.append(output.last_hidden_state)
    )

    def forward(*args: Any, **options: Any) -> Any:
        hidden.clear()
        output = plain(*args, **options)
        output.logits = how(output.logits, hidden[-1])
        return output

    model.forward = forward
    return model
