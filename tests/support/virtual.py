"""Random models with virtual tokens, what these start as, and generation behind them."""

from typing import Any

import torch
from torch import Tensor

import veneer
from support.random_adapters import copy_of, shake
from support.tiny_models import VOCAB, tiny

METHODS = ("prefix", "prompt")
COUNT = 5


def virtual(method: str, **options: Any) -> veneer.Method:
    return veneer.Method(method, **({"virtual_tokens": COUNT} | options))


def new_model(architecture: str, method: str, **options: Any) -> Any:
    return shake(veneer.attach(tiny(architecture), virtual(method, **options), seed=3))


def exact(model: Any) -> Any:
    """Return the model in float64, by whose logits those in float32 are judged."""
    return copy_of(model).double()


def first_tokens(seed: int) -> Tensor:
    """Return the tokens that virtual tokens start from."""
    return torch.randint(VOCAB, (COUNT,), generator=torch.Generator().manual_seed(seed))


def prepend(tokens: Tensor, text: Tensor) -> Tensor:
    return torch.cat([tokens.expand(len(text), -1), text], dim=1)


def with_wide_window(model: Any) -> Any:
    """Let attention reach back to the first token, where it would not."""
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 64
    return model


def generated(model: Any, rows: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return eight new tokens of each row, greedily, and the logits they were chosen by."""
    longest = max(map(len, rows))
    padded = [torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows]
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    out = model.generate(
        torch.stack(padded),
        attention_mask=torch.tensor(masks),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, longest:], torch.stack(out.logits, dim=1)
