"""Whether answers to one prompt can read its keys and values, computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import Batch, joined, pack, sharing_prompts
from veneer.fused.head import described

PROBE = 8  # tokens of a probe's prompt, half of which again are each answer
COUNTED = 1000  # pairs of which a person is given the tokens


def why_not_shared(
    model: PreTrainedModel,
    losses: Callable[[Batch], Tensor],
    tokens: list[int],
    *,
    tolerance: float,
) -> str | None:
    """Return why answers of this model do not share their prompts, or None: by what is known of its
    adapters and of the device, and by a pair of `tokens`. losses: of a packed batch's labels."""
    if model.device.type != "cpu":
        return "a card's attention over rows as they lie gives each row keys of its own"
    if virtual_tokens_of(model) is not None:
        return "virtual tokens stand before each row"
    if active_adapters_of(model).invocations is not None:
        return "an invocation is looked for in each row"
    whole = pack([_pair(tokens)], [0])
    try:  # in one pass: a mapped base is read from the disk at each
        own, shared = losses(joined([whole, sharing_prompts(whole)])).chunk(2)
    except Exception as error:  # whatever a foreign architecture raises
        return described(error)
    farthest = float((shared - own).abs().max())
    if farthest <= tolerance * float(own.abs().max()):
        return None
    return f"a token's loss is {farthest:.2g} from what it is behind a prompt of its own"


def notices_of(examples: Sequence[Example], why_not: str | None) -> list[str]:
    """Return what a person should know of rows that have one prompt."""
    if not examples[0].second:
        return [f"Each answer computes its prompt, since {why_not}."] if why_not else []
    if why_not:
        return [f"Both rows of a pair compute their prompt, since {why_not}."]
    count = min(len(examples), COUNTED)
    batch = pack(examples, range(count))
    computed, tokens = len(sharing_prompts(batch).tokens), len(batch.tokens)
    which = "the" if count == len(examples) else f"the first {count:,}"
    return [
        f"Both rows of a pair read one prompt, computed once: {computed:,} tokens of "
        f"{tokens:,} in {which} pairs."
    ]


def _pair(tokens: list[int]) -> Example:
    """Return a prompt with one answer, and the same answer from its end to its beginning."""
    longest = [token for _ in range(2 * PROBE) for token in tokens][: PROBE + PROBE // 2]
    prompt, answer = longest[:PROBE], longest[PROBE:]
    rows = [prompt + answer, prompt + answer[::-1]]
    labels = [[UNLABELLED] * PROBE + row[PROBE:] for row in rows]
    return Example([*rows[0], *rows[1]], [*labels[0], *labels[1]], "probe", 0, second=len(rows[0]))
