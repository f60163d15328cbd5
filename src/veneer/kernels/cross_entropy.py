"""Cross-entropy over the labelled rows alone, in chunks: logits for all rows never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # the label of a token that is not trained, as in torch and transformers
CHUNK_LOGITS = 2**23  # logits held at a time: 32 MB in float32


def labelled_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Return Σ −log softmax(head(h))[label] over the labelled rows, a float32 scalar.

    hidden (tokens, dim); labels (tokens,), where labels[t] is the token that follows row t, or
    IGNORED. `head` may be any module from (rows, dim) to (rows, words); gradients reach `hidden`
    and whatever of the head's parameters trains. Peak memory is one chunk of logits.
    """
    labelled = (labels != IGNORED).nonzero().squeeze(1)  # (rows,)
    rows, targets = hidden[labelled], labels[labelled]
    trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
    return _ChunkedLoss.apply(rows, targets, head, *trained)


class _ChunkedLoss(torch.autograd.Function):
    """Makes gradients in the forward pass, chunk by chunk, while the chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor
    ) -> Tensor:
        needs_rows = ctx.needs_input_grad[0]
        wants_gradients = needs_rows or bool(trained)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_trained = [torch.zeros_like(parameter) for parameter in trained]
        words = head.weight.shape[0]  # type: ignore[index]
        step = max(1, CHUNK_LOGITS // words)
        for first in range(0, len(rows), step):
            chunk = rows[first : first + step].detach().requires_grad_(needs_rows)
            with torch.set_grad_enabled(wants_gradients):
                logits = head(chunk)  # (chunk, words)
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = F.cross_entropy(
                    logits.to(wide), targets[first : first + step], reduction="sum"
                )
            total += loss.detach()
            if wants_gradients:
                inputs = [chunk, *trained] if needs_rows else list(trained)
                grads = list(torch.autograd.grad(loss, inputs))
                if d_rows is not None:
                    d_rows[first : first + step] = grads.pop(0)
                for sum_, grad in zip(d_trained, grads, strict=True):
                    sum_ += grad
        ctx.save_for_backward(d_rows, *d_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, *d_trained = ctx.saved_tensors
        scale = grads[0]
        first = None if d_rows is None else d_rows * scale.to(d_rows.dtype)
        return first, None, None, *(grad * scale for grad in d_trained)
