"""Cross-entropy over the labelled rows alone, in chunks: logits for all rows never exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.native import kernel

IGNORED = -100  # the label of a token that is not trained, as in torch and transformers
CHUNK_LOGITS = 2**24  # logits held at a time: 32 MB in bfloat16
# Rows of the head in one product. The matrix units work on a rearranged copy of their operand: of
# the whole head, it would be the largest tensor in memory. Smaller blocks cost time.
BLOCK_TOKENS = 2**14


def labelled_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Return Σ −log softmax(head(h))[label] over the labelled rows, a float32 scalar.

    hidden (tokens, dim); labels (tokens,), where labels[t] is the token that follows row t, or
    IGNORED. `head` may be any module from (rows, dim) to (rows, vocab); gradients reach `hidden`
    and whatever of the head's parameters trains. Peak memory is one chunk of logits.
    """
    labelled = (labels != IGNORED).nonzero().squeeze(1)  # (rows,)
    rows, targets = hidden[labelled], labels[labelled]
    trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
    return _ChunkedLoss.apply(rows, targets, head, *trained)


class _ChunkedLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, chunk by chunk, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor
    ) -> Tensor:
        needs_rows = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_trained = [torch.zeros_like(parameter) for parameter in trained]
        # `out_features` first: the weight of a quantized layer is dequantized at each access.
        vocab = int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[index]
        step = max(1, CHUNK_LOGITS // vocab)
        plain = (
            type(head) is nn.Linear
            and not trained
            and head.weight.dtype == rows.dtype
            and not torch.is_autocast_enabled(rows.device.type)
        )
        buffer = rows.new_empty(min(step, len(rows)), vocab) if plain else rows  # of one chunk
        for first in range(0, len(rows), step):
            here = slice(first, first + step)
            if plain:
                logits = buffer[: len(rows[here])]
                _write_logits(rows[here], head, logits)
                loss, gradient = cross_entropy(logits, targets[here], logits)
                if d_rows is not None:
                    d_rows[here] = _through(gradient, head.weight)  # type: ignore[arg-type]
            else:
                chunk = rows[here].detach().requires_grad_(needs_rows)
                inputs = [chunk, *trained] if needs_rows else list(trained)
                with torch.set_grad_enabled(bool(inputs)):
                    logits = head(chunk)
                values = logits.detach()
                loss, gradient = cross_entropy(values, targets[here], torch.empty_like(values))
                grads = list(torch.autograd.grad(logits, inputs, gradient)) if inputs else []
                if d_rows is not None:
                    d_rows[here] = grads.pop(0)
                for sum_, grad in zip(d_trained, grads, strict=True):
                    sum_ += grad
            total += loss
        ctx.save_for_backward(d_rows, *d_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, *d_trained = ctx.saved_tensors
        scale = grads[0]
        first = None if d_rows is None else d_rows * scale.to(d_rows.dtype)
        return first, None, None, *(grad * scale for grad in d_trained)


def _write_logits(rows: Tensor, head: nn.Module, logits: Tensor) -> None:
    """Write rows Wᵀ + b to `logits` (rows, vocab)."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    bias: Tensor | None = head.bias  # type: ignore[assignment]
    for tokens in _blocks(weight):
        torch.mm(rows, weight[tokens].T, out=logits[:, tokens])
    if bias is not None:
        logits += bias


def _through(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient W, (rows, dim), summed in float32 or wider."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = torch.zeros(len(gradient), weight.shape[1], dtype=wide, device=weight.device)
    for tokens in _blocks(weight):
        total += gradient[:, tokens] @ weight[tokens]
    return total


def _blocks(weight: Tensor) -> Iterator[slice]:
    for first in range(0, len(weight), BLOCK_TOKENS):
        yield slice(first, first + BLOCK_TOKENS)


def cross_entropy(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ −log softmax(logits)[target], and its gradient with respect to logits, in `out`.

    logits, out (rows, vocab), which may be one tensor; targets (rows,). Raises IndexError for a
    target outside of the vocabulary.
    """
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(f"A label is none of the {logits.shape[1]} tokens that the head knows.")
    wide = torch.promote_types(logits.dtype, torch.float32)
    native = kernel("cross_entropy", logits)
    if native is not None:
        losses = torch.empty(len(logits), dtype=wide)
        native(logits.contiguous(), targets, losses, out, *logits.shape)
        return losses.sum(), out
    log_p = logits.to(wide).log_softmax(-1)
    rows = torch.arange(len(logits), device=logits.device)
    loss = -log_p[rows, targets].sum()
    gradient = log_p.exp_()
    gradient[rows, targets] -= 1
    return loss, out.copy_(gradient)
