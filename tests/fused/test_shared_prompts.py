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
from veneer.fused.together import AdapterBatch, backward_together
from veneer.models.blocks import decoder_of
from veneer.models.device import CPU, RandomNumbers
from veneer.training.begin import let_train

PROMPT = [*range(3, 23)]  # longer than the windows of the kinds below


def long_pair():
    """A pair whose answers begin alike, and end far from each other."""
    rows = [[*PROMPT, 5, 9, 4, 8], [*PROMPT, 5, 7]]
    labels = [[UNLABELLED] * len(PROMPT) + row[len(PROMPT) :] for row in rows]
    return Example(rows[0] + rows[1], labels[0] + labels[1], "row", 0, second=len(rows[0]))


def answer(*tokens):
    """An answer to the same prompt that is no one's second."""
    return Example([*PROMPT, *tokens], [UNLABELLED] * len(PROMPT) + [*tokens], "row", 0)


ROWS = [*pairs(3), long_pair()]
DRAWN = [answer(5, 9, 9), answer(6), answer(4, 4, 7, 8, 3)]


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
    # Drawn answers stand behind a pair with their prompt, behind another pair, and last.
    batch = pack([*ROWS, *DRAWN], [2, 3, 4, 0, 5, 6, 1, 4])
    own = replace(forward, shares=False)
    ours, theirs = (weighed(each, model, batch) for each in (forward, own))
    wide = copy.deepcopy(model).double()
    exact = weighed(replace(choose_forward(wide, ROWS)[0], shares=False), wide, batch)
    assert_no_further(ours[0], theirs[0], exact[0], "the losses")
    assert_gradients_no_further(ours[1], theirs[1], exact[1])


@pytest.mark.parametrize(
    "recompute",
    ["full", *(pytest.param(how, marks=pytest.mark.slow) for how in ("selective", "disk"))],
)
def test_what_the_backward_pass_computes_again_reads_the_same_prompts(recompute):
    model = adapted("llama").double()
    batch = pack([*ROWS, *DRAWN], range(7))
    forwards = [choose_forward(model, ROWS, recompute=how)[0] for how in ("none", recompute)]
    assert [each.recompute for each in forwards] == ["none", recompute]
    assert all(each.shares for each in forwards)
    expected, ours = (weighed(each, model, batch) for each in forwards)
    torch.testing.assert_close(ours, expected)


def of_two_jobs(**options):
    """Return a model with two adapters that train, and how it computes."""
    model = tiny("llama")
    for name in "ab":
        veneer.attach(model, veneer.LoRA(rank=2, targets="all", **options), name=name)
    for name in "ab":
        let_train(model, name)  # attaching one has frozen the other
    veneer.use(model, None)
    shake(model, size=0.2)
    return model, choose_forward(model, ROWS)[0]


def test_jobs_with_one_prompt_have_keys_of_their_own():
    model, forward = of_two_jobs()
    assert forward.shares
    batches = [AdapterBatch(name, pack(ROWS, [3])) for name in "ab"]
    ours = backward_together(forward, model, batches)
    own = replace(forward, shares=False)
    expected = backward_together(own, model, batches, alone=dict.fromkeys("ab", ""))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    assert abs(ours[0] - ours[1]) > 1e-2 * ours[0]


@pytest.mark.parametrize("alone", [{}, dict.fromkeys("ab", "it is asked")])
def test_a_job_without_pairs_draws_its_own_masks_beside_one_with_pairs(alone):
    model, forward = of_two_jobs(dropout=0.5)
    model.train()
    rows = {"a": pack(ROWS, [3]), "b": pack(DRAWN, [0, 2])}

    def losses(forward, alone):
        drawing = {name: RandomNumbers(CPU, torch.Generator().manual_seed(7)) for name in rows}
        batches = [AdapterBatch(name, rows[name], random=drawing[name]) for name in rows]
        return backward_together(forward, model, batches, alone=alone)

    own = losses(replace(forward, shares=False), dict.fromkeys("ab", ""))
    torch.testing.assert_close(losses(forward, alone)[1], own[1], rtol=1e-4, atol=0)


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
