"""Pairs whose prompt is computed once: the same losses and gradients from fewer tokens."""

import copy
from dataclasses import replace

import pytest
import torch

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.pairs import pairs
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack, sharing_prompts
from veneer.fused.forward import choose_forward
from veneer.models.blocks import decoder_of

PROMPT = [*range(3, 23)]  # longer than the windows of the kinds below


def long_pair():
    """A pair whose answers begin alike, and end far from each other."""
    rows = [[*PROMPT, 5, 9, 4, 8], [*PROMPT, 5, 7]]
    labels = [[UNLABELLED] * len(PROMPT) + row[len(PROMPT) :] for row in rows]
    return Example(rows[0] + rows[1], labels[0] + labels[1], "row", 0, second=len(rows[0]))


ROWS = [*pairs(3), long_pair()]


def adapted(kind):
    return shake(veneer.attach(tiny(kind), veneer.LoRA(rank=2, targets="all")), size=0.2)


def weighed(forward, model, batch):
    """Return each label token's loss, and the gradients of their sum with unequal weights."""
    losses = forward.losses(model, batch)
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    total = (losses * torch.linspace(-1, 1, len(losses), dtype=losses.dtype)).sum()
    gradients = torch.autograd.grad(total, weights.values(), materialize_grads=True)
    return losses.detach(), dict(zip(weights, gradients, strict=True))


DEAR = [(kind, False) for kind in ("llama", "gpt_oss")] + [
    (kind, fused)
    for kind in ("mistral", "gemma2", "mixtral", "gpt2", "minicpm3", "phi3")
    for fused in (True, False)
]


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("llama", True),
        ("gpt_oss", True),  # windows and sinks
        *(pytest.param(*case, marks=pytest.mark.slow) for case in DEAR),
    ],
)
def test_losses_and_gradients_are_those_of_rows_with_prompts_of_their_own(kind, fused):
    model = adapted(kind)
    forward, notices = choose_forward(model, ROWS)
    assert forward.shares
    assert not any("since" in notice for notice in notices)
    forward = forward if fused else replace(forward, layers=())
    batch = pack(ROWS, [2, 3, 0, 1])
    own = replace(forward, shares=False)
    ours, theirs = (weighed(each, model, batch) for each in (forward, own))
    wide = copy.deepcopy(model).double()
    exact = weighed(replace(choose_forward(wide, ROWS)[0], shares=False), wide, batch)
    assert_no_further(ours[0], theirs[0], exact[0], "the losses")
    assert_gradients_no_further(ours[1], theirs[1], exact[1])


def test_a_prompt_is_computed_once_but_for_its_last_token():
    model, seen = adapted("llama"), []
    forward, (notice,) = choose_forward(model, ROWS)
    hook = decoder_of(model).register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    batch = pack(ROWS, range(len(ROWS)))
    try:
        losses = replace(forward, tokens_step=1).losses(model, batch)
    finally:
        hook.remove()
    prompts = [next(i for i, x in enumerate(e.labels) if x != UNLABELLED) for e in ROWS]
    computed = len(batch.tokens) - sum(prompts) + len(ROWS)
    assert seen == [computed]
    assert f"{computed} tokens of {len(batch.tokens)} in the pairs" in notice
    assert len(losses) == sum(example.label_tokens for example in ROWS)


def test_rows_without_a_common_beginning_stay_as_they_are():
    rows = [Example([1, 2, 3, 4, 5, 6], [UNLABELLED, 2, 3, UNLABELLED, 5, 6], "row", 0, second=3)]
    for examples in (rows, [replace(rows[0], second=0)]):
        batch = pack(examples, [0])
        assert sharing_prompts(batch).tokens.tolist() == batch.tokens.tolist()
        assert sharing_prompts(batch).lengths.tolist() == batch.lengths.tolist()


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        ("mamba", veneer.LoRA(rank=2, targets="all"), "rows are not packed"),
        ("llama", veneer.Method("prefix", virtual_tokens=2), "virtual tokens"),
        ("llama", veneer.LoRA(rank=2, invocation=(7, 8)), "an invocation"),
    ],
)
def test_what_cannot_share_says_so(kind, method, why):
    model = veneer.attach(tiny(kind), method)
    forward, notices = choose_forward(model, ROWS)
    assert not forward.shares
    assert any(f"Both rows of a pair compute their prompt, since {why}" in n for n in notices)
    assert not any(
        "pair" in notice for notice in choose_forward(model, [replace(ROWS[0], second=0)])[1]
    )
