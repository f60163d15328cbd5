"""One pass over a base for several adapters, each of which learns from rows of its own.

The rows of all are one packed batch, those of an adapter one behind the other. The base's products
are made once for all tokens; each adapter's own, on its own tokens (`lowrank/projection.py`). The
losses of the batches add up to one number, whose gradient falls apart by adapter: no other's loss
depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.active import Segments, active_adapters_of
from veneer.adapter.adapted import Adapted
from veneer.adapter.beside import why_alone_of
from veneer.adapter.config import LoRA
from veneer.adapter.new_tokens import new_tokens_of
from veneer.adapter.use import acting
from veneer.data.encode import Example
from veneer.data.packing import Batch, filled_up, joined, pack, sharing_prompts
from veneer.fused.forward import PROBE_LENGTHS, Forward
from veneer.fused.head import Head, described
from veneer.fused.inputs import PassInputs, unread_masks
from veneer.fused.recognise import TOLERANCE
from veneer.kernels.cross_entropy import IGNORED, Labelled, TokenLoss, losses_of
from veneer.kernels.segments import are_compiled
from veneer.kernels.shared_packing import packing_of
from veneer.models.device import RandomNumbers, random_state, set_random_state
from veneer.models.evaluating import evaluating

SHAPES = 16  # numbers of tokens, between one power of two and the next, that segments have


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """The rows from which one adapter learns in a pass.

    adapter    the name under which it is attached
    batch      its rows
    divisor    what its loss is divided by before the backward pass, such as its step's label tokens
    random     what its dropout draws; torch's own numbers unless given
    loss       what makes its loss of the losses of its label tokens, (labelled,): their sum
    token_loss what these losses are, −log p unless given
    head       what makes them, the model's own unless given; such rows need a pass of their own
    """

    adapter: str
    batch: Batch
    divisor: int = 1
    random: RandomNumbers | None = None
    loss: Callable[[Tensor], Tensor] = Tensor.sum
    token_loss: TokenLoss | None = None
    head: Head | None = None


def backward_together(
    forward: Forward,
    model: PreTrainedModel,
    batches: Sequence[AdapterBatch],
    *,
    alone: Mapping[str, str] | None = None,
) -> Tensor:
    """Add to the gradients of each adapter those of its batch's loss / divisor, and return the
    losses, (batches,), in float32.

    alone: the adapters that need a pass of their own, as `why_alone` names them.

    Each adapter's loss and gradients are those of a pass of its own, but for rounding: nothing of
    one batch reaches another. Nor does a number that is not finite, but in compiled FlexAttention
    (soft-capped scores on a card), which multiplies the values of hidden keys by 0. The names must
    differ. Which adapters act afterwards is what it was before.
    """
    return _pass(forward, model, batches, alone or {}, backward=True)


def why_alone(
    forward: Forward, model: PreTrainedModel, names: Sequence[str], rows: Sequence[Example]
) -> dict[str, str]:
    """Return the adapters that need passes of their own, and why: the kind of each, and for all of
    them what a trial on a few tokens of `rows` shows, or what the base is."""
    reasons = {name: why for name in names if (why := why_alone_of(model, name))}
    sharing = [name for name in names if name not in reasons]
    if not forward.packed:
        why_none: str | None = "rows are not packed"
    elif forward.context is not None:
        why_none = "processes share each row's tokens"
    elif new_tokens_of(model) is not None:
        why_none = "the base has new tokens"
    else:
        tried = _two_of_each_kind(model, sharing)
        why_none = _why_not_together(forward, model, tried, rows) if len(tried) > 1 else None
    return reasons | (dict.fromkeys(sharing, why_none) if why_none else {})


def kind_of(model: PreTrainedModel, name: str) -> Hashable:
    """Return what adapters have in common that differ in ranks and other numbers alone: the same
    functions compute them."""
    config = active_adapters_of(model).configs[name]
    values = asdict(config).values()
    kind = (bool(each) if isinstance(each, int | float) else str(each) for each in values)
    # What an adapter holds that its configuration does not say is why it has passes of its own.
    return type(config), *kind, why_alone_of(model, name), new_tokens_of(model) is None


def _two_of_each_kind(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return at most two adapters of each kind. A mapped base is read from disk at each pass of a
    trial."""
    kinds: dict[Hashable, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(model, name), []).append(name)
    return [name for alike in kinds.values() for name in alike[:2]]


def _why_not_together(
    forward: Forward, model: PreTrainedModel, names: Sequence[str], rows: Sequence[Example]
) -> str | None:
    """Return why one pass does not give the loss of a pass for each adapter, or None."""
    short = [
        Example(tokens, tokens, "probe", 0)
        for row, length in zip(rows, PROBE_LENGTHS, strict=False)
        if len(tokens := row.tokens[:length]) > 1
    ]
    batches = [AdapterBatch(name, pack(short, [i % len(short)])) for i, name in enumerate(names)]
    with evaluating(model):
        expected = _pass(forward, model, batches, dict.fromkeys(names, ""), backward=False)
        try:
            losses = _pass(forward, model, batches, {}, backward=False)
            draws = _draws(forward, model, batches[0].batch)
        except Exception as error:  # whatever a foreign architecture raises
            return described(error)
    if draws:
        return "the base draws random numbers by itself in training, as dropout does"
    tolerance = TOLERANCE[model.dtype]
    near = torch.isclose(losses, expected, rtol=tolerance, atol=0.0, equal_nan=True)
    if near.all():
        return None
    which = int(near.int().argmin())
    return f"its loss of {losses[which]:.6g} differs from {expected[which]:.6g} alone"


def _draws(forward: Forward, model: PreTrainedModel, batch: Batch) -> bool:
    """Return whether the base draws random numbers in training: by dropout, or in its routers. They
    would come from no adapter's own generator."""
    states = {device: random_state(device) for device in (torch.device("cpu"), model.device)}
    with evaluating(model), acting(model, None), torch.no_grad():
        model.train()
        forward(model, batch)
    drawn = False
    for device, before in states.items():
        drawn |= not torch.equal(random_state(device), before)
        set_random_state(device, before)
    return drawn


def _pass(
    forward: Forward,
    model: PreTrainedModel,
    batches: Sequence[AdapterBatch],
    alone: Mapping[str, str],
    *,
    backward: bool,
) -> Tensor:
    losses: dict[str, Tensor] = {}
    sharing = [each for each in batches if each.adapter not in alone]
    if len(sharing) == 1:  # to the bit what it is by itself
        sharing = []
    with torch.set_grad_enabled(backward):
        if sharing:
            with _losses(forward, model, sharing) as of_all:
                if backward:
                    pairs = zip(of_all, sharing, strict=True)
                    torch.stack([loss / each.divisor for loss, each in pairs]).sum().backward()
            names = [each.adapter for each in sharing]
            losses |= dict(zip(names, of_all.detach(), strict=True))
        for each in batches:
            if each.adapter not in losses:
                losses[each.adapter] = _alone(forward, model, each, backward=backward)
    return torch.stack([losses[each.adapter] for each in batches])


@contextmanager
def _losses(
    forward: Forward, model: PreTrainedModel, batches: Sequence[AdapterBatch]
) -> Iterator[Tensor]:
    """Yield each batch's loss, (batches,), by one pass. The backward pass belongs into
    the context, where it may compute layers again."""
    device, active = model.device, active_adapters_of(model)
    if forward.shares:
        batches = [
            replace(each, batch=sharing_prompts(each.batch)) if each.batch.has_pairs else each
            for each in batches
        ]
    batches = [
        each if _has_table(model, each) else replace(each, batch=of_like_shape(each.batch))
        for each in batches
    ]
    batch = filled_up(joined([each.batch for each in batches]), forward.tokens_step)
    ends = accumulate((len(each.batch.tokens) for each in batches), initial=0)
    tokens = [slice(*pair) for pair in pairwise(ends)]
    own_tokens = zip(batches, tokens, strict=True)
    of_adapters = tuple((each.adapter, own, _generator(each)) for each, own in own_tokens)
    segments = Segments(len(batch.tokens), of_adapters)
    packing = packing_of(batch.lengths.tolist(), batch.before, device)
    arguments = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None]}
    inputs = PassInputs.sent(arguments, batch.labels, device)
    generators = [own for each in batches if (own := _generator(each)) is not None]
    with (
        unread_masks(device),
        forward.installed(model) as installation,
        acting(model, None),
        active.by_segments(segments),
        installation.running(packing, generators),
    ):
        options: dict[str, Any] = {"packing": packing} if installation.attention else {}
        options |= {"use_cache": False, **inputs.arguments}
        if forward.head is not None:
            hidden = installation.decoder(**options).last_hidden_state.flatten(0, 1)
            losses = _from_hidden(forward.head, model, hidden, inputs.labels, batches)
        else:
            logits = model(**options).logits.flatten(0, 1)
            own_labels = _pieces(inputs.labels, batches)
            losses = [losses_of(logits, own, each.token_loss) for each, own in own_labels]
        pairs = zip(batches, losses, strict=True)
        yield torch.stack([each.loss(own) for each, own in pairs])


def _has_table(model: PreTrainedModel, batch: AdapterBatch) -> bool:
    """Return whether compiled functions multiply rows, of any number, with the factors."""
    config = active_adapters_of(model).configs[batch.adapter]
    if not isinstance(config, LoRA) or config.dropout or config.invocation_tokens:
        return False
    return are_compiled(torch.empty(0, dtype=model.dtype, device=model.device))


def of_like_shape(batch: Batch) -> Batch:
    """Return an adapter's rows, filled up so that torch's products have one of a few shapes: to
    prepare new ones took a tenth of a pass over 135M weights for eight adapters with 50 tokens
    each. Of 48 tokens or more at most a sixteenth, and a thirty-second in the mean, is added."""
    tokens = len(batch.tokens)
    return filled_up(batch, 2 ** max(2, (tokens // SHAPES).bit_length() - 1))


def _from_hidden(
    head: Head,
    model: PreTrainedModel,
    hidden: Tensor,
    labelled: Labelled,
    batches: Sequence[AdapterBatch],
) -> Sequence[Tensor]:
    """Return the losses of each batch's label tokens, (labelled,), for what the decoder gives of
    all; hidden (tokens, dim). Adapters of the head read labelled rows alone, and so act one after
    another, as losses that are not those of labels are made."""
    active, module = active_adapters_of(model), model.get_output_embeddings()
    adapted = isinstance(module, Adapted) and {each.adapter for each in batches} & {
        *module.adapters
    }
    if not adapted and all(each.token_loss is None for each in batches):
        with active.on_all(None):
            return head.losses(model, hidden, labelled).split(_label_counts(batches))
    losses = []
    for each, own in _pieces(labelled, batches):
        acts = partial(active.on_all, each.adapter)
        with acts(), _drawing(each):
            losses.append(head.losses(model, hidden, own, each.token_loss, again=acts))
    return losses


def _pieces(
    labelled: Labelled, batches: Sequence[AdapterBatch]
) -> Iterator[tuple[AdapterBatch, Labelled]]:
    """Yield each batch with its own ones of the labelled rows of all."""
    counts = _label_counts(batches)
    pieces = zip(batches, labelled.rows.split(counts), labelled.targets.split(counts), strict=True)
    for each, rows, targets in pieces:
        yield each, replace(labelled, rows=rows, targets=targets)


def _label_counts(batches: Sequence[AdapterBatch]) -> list[int]:
    return [int((each.batch.labels != IGNORED).sum()) for each in batches]


def _alone(
    forward: Forward, model: PreTrainedModel, each: AdapterBatch, *, backward: bool
) -> Tensor:
    """Return the loss of a batch by a pass of its own."""
    # To the bit what it is by itself: with dropout, rows that share a prompt draw other masks.
    shares = forward.shares and each.batch.has_pairs
    if each.head is not None or shares != forward.shares:
        forward = replace(forward, head=each.head or forward.head, shares=shares)
    with acting(model, each.adapter), _drawing(each):
        loss = each.loss(forward.losses(model, each.batch, each.token_loss))
        if backward:
            (loss / each.divisor).backward()
    return loss.detach()


def _drawing(each: AdapterBatch) -> AbstractContextManager[None]:
    """Let torch draw a batch's own random numbers while the context lasts."""
    return nullcontext() if each.random is None else each.random.drawn()


def _generator(each: AdapterBatch) -> torch.Generator | None:
    """Return what a batch's masks are drawn from, on the CPU; None for torch's own."""
    return None if each.random is None else each.random.generator
