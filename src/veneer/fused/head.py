"""The head of a model on the labelled rows alone, proven to give the model's own logits.

Many models do more than multiply by their head's weight: they scale logits (Cohere, Granite,
Falcon-H1) or what the head reads (MiniCPM3), or cap them softly (Gemma 2). What a model does is
measured: while its own forward runs, a hook adds rows of known numbers to the head's output, and
what comes out in their place is fitted. The same pass gives the logits that the result must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.layers import AdaptedLayer
from veneer.kernels.cross_entropy import (
    CHUNK_LOGITS,
    PLAIN,
    From,
    Labelled,
    Logits,
    TokenLoss,
    labelled_cross_entropy,
)
from veneer.models.block_buffers import whole
from veneer.models.blocks import decoder_of

# Numbers beyond every soft cap, and numbers from 2^-8 to 2^12 of both signs. float16 holds them.
BEYOND = (1.5e4, 3e4)
SPREAD_ROWS, SMALLEST, LARGEST = 2, -8.0, 12.0
MORE = "its head does more than multiply, scale and cap"


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its decoder's output: with its output embeddings, or the module
    at `path`, which read it in `dtype` (None: as it is), and what `logits` says of their product.
    """

    logits: Logits = PLAIN
    dtype: torch.dtype | None = None
    path: str | None = None

    def product(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Return what the output embeddings give, (..., vocab), for hidden (..., dim)."""
        z: Tensor = self._module(model)(hidden.to(self.dtype or hidden.dtype))
        return z

    def losses(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        labelled: Labelled,
        token_loss: TokenLoss | None = None,
        *,
        again: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """Return −log p of the label of each labelled row, or its token_loss, (labelled,); hidden
        (tokens, dim). again: the context of what the backward pass computes once more."""
        hidden, head = hidden.to(self.dtype or hidden.dtype), self._module(model)
        of_all = token_loss.of_all if isinstance(token_loss, From) else token_loss
        if isinstance(of_all, NotedStates):
            return of_all.note(hidden[labelled.rows])
        with whole(head):  # whose weight is read without a call
            acting = head.acting_parameters() if isinstance(head, AdaptedLayer) else None
            return labelled_cross_entropy(
                *(hidden, labelled, head, self.logits),
                acting=acting,
                token_loss=token_loss,
                again=again,
            )

    def _module(self, model: PreTrainedModel) -> nn.Module:
        return _module(model) if self.path is None else model.get_submodule(self.path)


@dataclass(eq=False)
class NotedStates:
    """Notes what a head reads at the labelled rows of a pass, of which `logits` makes their logits
    a few at a time; where a model makes the logits of all rows itself, these. It stands where a
    token loss does, and is zero."""

    model: PreTrainedModel
    head: Head | None
    step_logits: ClassVar[int] = CHUNK_LOGITS
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Note logits."""
        return self.note(logits(z)), out.zero_()

    def note(self, states: Tensor) -> Tensor:
        """Note what the next labelled rows have, (rows, dim), and return a loss of each."""
        self.states.append(states.detach())
        return states.new_zeros(len(states), dtype=torch.float32)

    def logits(self, first: int, count: int) -> Tensor:
        """Return the logits of labelled rows, (count, vocab), float32 or wider, by the head as it
        acts now."""
        if len(self.states) > 1:
            self.states = [torch.cat(self.states)]
        z = self.states[0][first : first + count]
        if self.head is not None:
            z = self.head.product(self.model, z)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z if self.head is None else self.head.logits(z)


def own_logits_and_head(
    model: PreTrainedModel, tokens: Tensor
) -> tuple[Tensor, Head | None, str | None]:
    """Return the model's own logits of `tokens` (1, tokens), as (tokens, vocab), and the head that
    gives them; or None and why no head does."""
    if model.get_output_embeddings() is None:
        return model(input_ids=tokens, use_cache=False).logits[0], None, "it names no head"
    try:
        own = _own_pass(model, tokens)
    except Exception:  # a foreign architecture may raise anything where it gets more rows
        return model(input_ids=tokens, use_cache=False).logits[0], None, MORE
    logits = own.logits[: tokens.shape[1]]
    try:
        head = _fitted(model, tokens, own)
    except Exception as error:  # whatever it raises, the slower way is open
        return logits, None, described(error)
    return logits, head, None if head else MORE


def described(error: Exception) -> str:
    """Return the kind of an error and its message."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass through the model: what its head read (tokens, dim), what it gave, and the logits that
    the model made of that. The last two are (tokens + more, vocab); the rows of `_numbers` come
    last."""

    inputs: Tensor
    product: Tensor
    logits: Tensor


def _own_pass(model: PreTrainedModel, tokens: Tensor) -> _Pass:
    passes: list[tuple[Tensor, Tensor]] = []

    def add_numbers(module: nn.Module, args: tuple, product: Any) -> Tensor:
        assert not passes  # a head that is called twice is none of those described above
        more = _numbers(product.shape[-1]).to(product)
        more = more.expand(*product.shape[:-2], *more.shape)
        z = torch.cat([product, more], dim=-2)  # (1, tokens + more, vocab)
        passes.append((args[0], z))
        return z

    hook = _module(model).register_forward_hook(add_numbers)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    finally:
        hook.remove()
    ((inputs, z),) = passes
    return _Pass(inputs.flatten(0, -2), z.flatten(0, -2), logits)


def _numbers(vocab: int) -> Tensor:
    """Return rows of numbers to put through what a model does behind its head, (rows, vocab)."""
    exponents = torch.linspace(SMALLEST, LARGEST, SPREAD_ROWS * vocab, dtype=torch.float64)
    spread = exponents.exp2()
    spread[::2] *= -1
    beyond = torch.tensor(BEYOND, dtype=torch.float64)
    return torch.cat([beyond[:, None].expand(-1, vocab), spread.view(SPREAD_ROWS, vocab)])


def _fitted(model: PreTrainedModel, tokens: Tensor, own: _Pass) -> Head | None:
    """Return the head that gives the logits of the model's own pass, or None."""
    hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[0]
    settings, count = _settings(model), len(hidden)
    rounding = torch.finfo(own.logits.dtype).eps
    known, made = _wide(own.product[count:]), _wide(own.logits[count:])
    behind = _measured(known, made, settings, rounding)
    if behind is None:
        return None
    for z, y in zip(own.product, own.logits, strict=True):  # row by row, to need little memory
        if not _equal(behind(_wide(z)), _wide(y), rounding):
            return None
    dtype = own.inputs.dtype if own.inputs.dtype != hidden.dtype else None
    rounding = torch.finfo(own.inputs.dtype).eps
    inputs, states = _wide(own.inputs), _wide(hidden)
    before = _nearest(float((inputs * states).sum() / states.square().sum()), settings, rounding)
    head = Head(Logits(before * behind.scale, behind.softcap), dtype)
    # The same operations on the same numbers, but for a scale: anything but the last bits is
    # another meaning.
    allowed = 1e-3 if before == 1 else max(1e-3, rounding)
    products = zip(head.product(model, hidden), own.product[:count], strict=True)
    near = all(_near(_wide(ours) * before, _wide(z), allowed) for ours, z in products)
    return head if near else None


def _measured(
    known: Tensor, made: Tensor, settings: Iterable[float], rounding: float
) -> Logits | None:
    """Return how the model makes logits of numbers (rows, vocab) as `_numbers` has them.

    `rounding` is the largest relative error of one rounding in the model's dtype.
    """
    less, most = (row.median().item() for row in made[: len(BEYOND)])
    softcap = None
    if abs(most - less) <= rounding * abs(most):
        softcap = _nearest(most, settings, rounding)
    z, y = known[len(BEYOND) :].flatten(), made[len(BEYOND) :].flatten()
    if softcap is not None:
        inside = y.abs() < 0.75 * softcap  # tanh tells nothing of its argument further out
        z, y = z[inside], softcap * torch.atanh(y[inside] / softcap)
    # The median over many numbers is nearer than one number's rounding.
    scale = (y / z).median().item() if len(z) else 0.0
    return Logits(_nearest(scale, settings, rounding), softcap) if scale > 0 else None


def _nearest(value: float, settings: Iterable[float], rounding: float) -> float:
    """Return 1, a setting or its inverse, if that is what was measured; else the value itself."""
    exact = [1.0, *(number for setting in settings for number in (setting, 1 / setting))]
    nearest = min(exact, key=lambda number: abs(number - value))
    return nearest if abs(nearest - value) <= max(rounding / 4, 1e-6) * abs(value) else value


def _settings(model: PreTrainedModel) -> list[float]:
    """Return the positive numbers of a model's configuration."""
    configs = (model.config, model.config.get_text_config())
    values = [value for config in configs for value in config.to_dict().values()]
    return [float(x) for x in values if isinstance(x, int | float) and x > 0]


def _equal(ours: Tensor, own: Tensor, rounding: float) -> bool:
    """Return whether logits are equal but for the rounding of four operations."""
    return bool(((ours == own) | ((ours - own).abs() <= 4 * rounding * own.abs())).all())


def _near(ours: Tensor, own: Tensor, allowed: float) -> bool:
    """Return whether a row of logits is that near to another, relatively to its length."""
    finite = own.isfinite()  # new tokens have the logit -∞ while no adapter acts
    distance, length = (ours - own)[finite].norm(), own[finite].norm()
    return torch.equal(ours[~finite], own[~finite]) and bool(distance <= allowed * length)


def _wide(values: Tensor) -> Tensor:
    return values.cpu().double()


def _module(model: PreTrainedModel) -> nn.Module:
    module = model.get_output_embeddings()
    assert isinstance(module, nn.Module)
    return module
