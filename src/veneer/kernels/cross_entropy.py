"""Cross-entropy over the labelled rows alone, in chunks: logits for all rows never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels import choice
from veneer.kernels.native import kernel

IGNORED = -100  # the label of a token that is not trained, as in torch and transformers
CHUNK_LOGITS = 2**24  # logits held at a time: 32 MB in bfloat16
# Rows of the head in one product. The matrix units work on a rearranged copy of their operand: of
# the whole head, it would be the largest tensor in memory. Smaller blocks cost time.
BLOCK_TOKENS = 2**14


@dataclass(frozen=True)
class Logits:
    """Logits y = scale · z, or softcap · tanh(scale · z / softcap), of what a head makes, z."""

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        assert self.scale > 0  # the largest z has the largest y
        assert self.softcap is None or self.softcap > 0

    def __call__(self, z: Tensor) -> Tensor:
        """Return y, of the shape and dtype of z."""
        y = z if self.scale == 1 else z * self.scale
        return y if self.softcap is None else torch.tanh(y / self.softcap) * self.softcap

    def slope(self, y: Tensor) -> Tensor | float:
        """Return dy/dz where the logits are y."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (y / self.softcap).square())


PLAIN = Logits()


@dataclass(frozen=True, eq=False)
class Labelled:
    """Which rows have a label, and which label: known on the host, so that no device is asked.

    rows     (labelled,)  int64
    targets  (labelled,)  int64: the token that follows each of these rows
    lowest, highest       of the targets, 0 where there are none
    """

    rows: Tensor
    targets: Tensor
    lowest: int
    highest: int

    @classmethod
    def of(cls, labels: Tensor) -> Labelled:
        """Return the labelled ones of rows (tokens,) on the host, where the others are IGNORED."""
        rows = (labels != IGNORED).nonzero().squeeze(1)
        targets = labels[rows]
        return cls(rows, targets, *bounds(targets.numpy()))


class TokenLoss(Protocol):
    """What is learnt at the labelled rows of a pass, in place of −log p of their labels."""

    @property
    def step_logits(self) -> int:
        """The logits of a chunk."""
        ...

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return the loss of each row of a chunk, (rows,), float32 or wider, and the gradient of
        their sum with respect to z, in `out`.

        z, out (rows, vocab), which may be one tensor; first: the number of the chunk's first row
        among all labelled ones, in their order.
        """
        ...


@dataclass(frozen=True, eq=False)
class LabelLoss:
    """−log p of the labels."""

    labelled: Labelled

    @property
    def step_logits(self) -> int:
        """The logits of a chunk."""
        return CHUNK_LOGITS

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return what `cross_entropy` does. Raises IndexError for a label beyond the vocabulary."""
        _check(self.labelled.lowest, self.labelled.highest, z.shape[1])
        return cross_entropy(z, self.labelled.targets[first : first + len(z)], out, logits)


@dataclass(frozen=True, eq=False)
class From:
    """A token loss over the labelled rows from one on, whose number is `start`."""

    of_all: TokenLoss
    start: int

    @property
    def step_logits(self) -> int:
        """The logits of a chunk."""
        return self.of_all.step_logits

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return the losses of a chunk's rows and their gradient."""
        return self.of_all(z, self.start + first, out, logits)


def bounds(targets: NDArray[np.int64]) -> tuple[int, int]:
    """Return the lowest and the highest of some labels, 0 where there are none."""
    return (int(np.min(targets)), int(np.max(targets))) if len(targets) else (0, 0)


def labelled_cross_entropy(
    hidden: Tensor,
    labelled: Labelled,
    head: nn.Module,
    logits: Logits = PLAIN,
    *,
    acting: Iterable[nn.Parameter] | None = None,
    token_loss: TokenLoss | None = None,
    again: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Return −log softmax(logits(head(h)))[label] of each labelled row, (labelled,), in float32, or
    what `token_loss` makes of these logits.

    hidden (tokens, dim). `head` may be any module from (rows, dim) to (rows, vocab); gradients
    reach `hidden` and whatever of the head's parameters trains. acting: those of them on which its
    output depends now; all unless given. Peak memory is one chunk of logits. Where the head trains,
    it is computed once more on the way back, unless all losses have one weight, as in a sum: within
    what `again` returns, and with the same random numbers.
    Raises IndexError for a label outside of the vocabulary.
    """
    rows = hidden[labelled.rows]
    acting = head.parameters() if acting is None else acting
    trained = [p for p in acting if p.requires_grad and torch.is_grad_enabled()]
    token_loss = LabelLoss(labelled) if token_loss is None else token_loss
    losses: Tensor = _ChunkedLoss.apply(rows, token_loss, head, logits, again, *trained)
    return losses


class _ChunkedLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, chunk by chunk, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        token_loss: TokenLoss,
        head: nn.Module,
        logits: Logits,
        again: Callable[[], AbstractContextManager[None]],
        *trained: Tensor,
    ) -> Tensor:
        ctx.again, ctx.random = again, torch.get_rng_state() if trained else None
        needs_rows = ctx.needs_input_grad[0]
        losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_trained = [torch.zeros_like(parameter) for parameter in trained]
        # `out_features` first: the weight of a quantized layer is dequantized at each access.
        vocab = int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[index]
        step = max(1, token_loss.step_logits // vocab)
        plain = (
            type(head) is nn.Linear
            and not trained
            and head.weight.dtype == rows.dtype
            and not torch.is_autocast_enabled(rows.device.type)
        )
        buffer = rows.new_empty(min(step, len(rows)), vocab) if plain else rows  # one chunk of z
        for first in range(0, len(rows), step):
            here = slice(first, first + step)
            if plain:
                z = buffer[: len(rows[here])]
                _write_product(rows[here], head, z)
                losses[here], gradient = token_loss(z, first, z, logits)
                if d_rows is not None:
                    d_rows[here] = _through(gradient, head.weight)  # type: ignore[arg-type]
            else:
                losses[here] = _by_autograd(
                    *(head, rows[here], token_loss, first, logits),
                    *(trained, d_trained, None if d_rows is None else d_rows[here]),
                )
        ctx.save_for_backward(d_rows, rows if trained else None, *trained, *d_trained)
        ctx.token_loss, ctx.head, ctx.logits, ctx.step = token_loss, head, logits, step
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, rows, *tensors = ctx.saved_tensors
        trained, d_trained = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        weights = grads[0]  # (labelled,)
        first = None if d_rows is None else d_rows * weights.to(d_rows.dtype)[:, None]
        if not trained or not len(weights):
            return first, None, None, None, None, *d_trained
        if weights.stride() == (0,):  # one number for all
            return first, None, None, None, None, *(grad * weights[0] for grad in d_trained)
        d_trained = [torch.zeros_like(parameter) for parameter in trained]
        with ctx.again(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random)  # for the same masks of dropout
            for start in range(0, len(rows), ctx.step):
                here = slice(start, start + ctx.step)
                _by_autograd(
                    *(ctx.head, rows[here], ctx.token_loss, start, ctx.logits),
                    *(trained, d_trained, None, weights[here]),
                )
        return first, None, None, None, None, *d_trained


def _by_autograd(
    head: nn.Module,
    rows: Tensor,
    token_loss: TokenLoss,
    first: int,
    logits: Logits,
    trained: Sequence[Tensor],
    d_trained: Sequence[Tensor],
    d_rows: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the losses of one chunk's rows, (rows,), add its gradients to d_trained, and write
    those of its rows to d_rows, if any. first: the number of its first row. weights: of the rows'
    losses in the gradients, 1 each unless given. What the chunk took is free when this returns,
    before the next one begins."""
    chunk = rows.detach().requires_grad_(d_rows is not None)
    inputs = [*trained] if d_rows is None else [chunk, *trained]
    with torch.set_grad_enabled(bool(inputs)):
        z = head(chunk)
    values = z.detach()
    losses, gradient = token_loss(values, first, torch.empty_like(values), logits)
    if weights is not None:
        gradient = gradient * weights.to(gradient.dtype)[:, None]
    grads = list(torch.autograd.grad(z, inputs, gradient)) if inputs else []
    if d_rows is not None:
        d_rows.copy_(grads.pop(0))
    for sum_, grad in zip(d_trained, grads, strict=True):
        sum_ += grad
    return losses


def losses_of(logits: Tensor, labelled: Labelled, token_loss: TokenLoss | None = None) -> Tensor:
    """Return −log p of the label of each labelled row, or its token_loss, (labelled,), in float32;
    logits (tokens, vocab) are those of all tokens."""
    rows = logits[labelled.rows].float()
    if token_loss is None:
        return F.cross_entropy(rows, labelled.targets, reduction="none")
    losses: Tensor = _LossByLogits.apply(rows, token_loss)
    return losses


class _LossByLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, token_loss: TokenLoss) -> Tensor:
        losses, gradient = token_loss(z, 0, torch.empty_like(z), PLAIN)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None


def _write_product(rows: Tensor, head: nn.Module, z: Tensor) -> None:
    """Write rows Wᵀ + b to z (rows, vocab)."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    bias: Tensor | None = head.bias  # type: ignore[assignment]
    for tokens in _blocks(weight):
        torch.mm(rows, weight[tokens].T, out=z[:, tokens])
    if bias is not None:
        z += bias


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


def _check(lowest: int, highest: int, vocab: int) -> None:
    if not 0 <= lowest <= highest < vocab:
        raise IndexError(f"A label is none of the {vocab} tokens that the head knows.")


def cross_entropy(
    z: Tensor, targets: Tensor, out: Tensor, logits: Logits = PLAIN
) -> tuple[Tensor, Tensor]:
    """Return −log softmax(logits(z))[target] of each row, (rows,), float32 or wider, and the
    gradient of their sum with respect to z, in `out`.

    z, out (rows, vocab), which may be one tensor; targets (rows,). On a CPU, IndexError is raised
    for a target outside of the vocabulary.
    """
    if targets.device.type == "cpu":
        _check(*bounds(targets.numpy()), z.shape[1])
    wide = torch.promote_types(z.dtype, torch.float32)
    native = kernel("cross_entropy", z)
    if native is not None:
        losses = torch.empty(len(z), dtype=wide)
        softcap = logits.softcap or 0.0
        native(z.contiguous(), targets, losses, out, logits.scale, softcap, *z.shape)
        return losses, out
    if choice.uses_triton(z, out):
        from veneer.kernels import triton_cross_entropy as own

        losses = own.cross_entropy(z, targets, out, scale=logits.scale, softcap=logits.softcap)
        return losses, out
    y = logits(z.to(wide))
    log_p = y.log_softmax(-1)
    rows = torch.arange(len(z), device=z.device)
    losses = -log_p[rows, targets]
    gradient = log_p.exp_()
    gradient[rows, targets] -= 1
    return losses, out.copy_(gradient.mul_(logits.slope(y)))
