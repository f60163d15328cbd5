"""Law 8: accumulation equals the large batch, normalised by label tokens."""

from dataclasses import replace
from typing import Any

import torch

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.kinds import Kind, each_kind, has_own_tensors, in_share, is_first, is_first_of
from support.plain import plain_pair
from veneer.data.encode import UNLABELLED, Example
from veneer.training.events import Step

# What differs in how gradients come to the optimizer.
EACH_SIZE = {
    *("lora, llama", "mix, llama", "lora+, llama", "new tokens, qwen2", "all at once, qwen2"),
    *("prefix, llama", "prompt, mistral", "full, llama"),
}


def takes_its_own_course(kind: Kind) -> bool:
    """Return whether a kind's gradients come to the optimizer in a way of their own: not where it
    is another by its layers, start or architecture, of which law 7 proves the gradients."""
    own = is_first_of(kind, "name") and has_own_tensors(kind)
    return str(kind) in EACH_SIZE or (own and in_share(3, trains=True)(kind))


def lopsided(kind: Kind) -> list[Example]:
    """Return rows of which some are learnt whole and some at one token."""
    rows = kind.rows([20, 6, 15, 30], seed=5, learnt=0.0)
    return [
        replace(row, labels=[UNLABELLED, *row.tokens[1:]]) if i % 2 else row
        for i, row in enumerate(rows)
    ]


def has_no_dropout(kind: Kind) -> bool:
    """Return whether a kind drops no inputs, which would be other ones in each pass."""
    return not (kind.lora or {}).get("dropout")


@each_kind(lambda kind: is_first(kind) and has_no_dropout(kind), fast=takes_its_own_course)
def test_accumulation_equals_the_large_batch(kind, monkeypatch):
    rows, model = lopsided(kind), kind.shaken()
    label_tokens = sum(row.label_tokens for row in rows)
    plain, exact = plain_pair(kind, model)
    peer, expected = plain.loss(rows) / label_tokens, exact.loss(rows) / label_tokens
    peers, exactly = plain.gradients(peer), exact.gradients(expected)
    # Of the batch as a whole and of rows alone, law 7 proves the gradients of every kind.
    for tokens_per_batch in (None, 32, 1) if str(kind) in EACH_SIZE else (32,):
        step, gradients = one_step(kind, rows, tokens_per_batch, monkeypatch)
        assert step.label_tokens == label_tokens
        assert step.tokens == sum(len(row.tokens) for row in rows)
        assert_no_further(torch.tensor(step.loss, dtype=torch.float64), peer, expected, "the loss")
        # A weight without a gradient counts as one of zeros in the optimizer's buffer.
        assert not any(gradients[name].any() for name in gradients.keys() - exactly.keys())
        ours = {name: gradients[name] for name in exactly}
        assert_gradients_no_further(ours, peers, exactly)


def one_step(
    kind: Kind, rows: list[Example], tokens_per_batch: int | None, monkeypatch: Any
) -> tuple[Step, dict[str, torch.Tensor]]:
    """Return a step over all rows, and the gradients that the optimizer is given."""
    model = kind.shaken()
    gradients: dict[str, torch.Tensor] = {}

    def note(_: Any, norm: float) -> torch.Tensor:
        named = model.named_parameters()
        gradients.update({n: w.grad.clone() for n, w in named if w.grad is not None})
        return torch.zeros(())

    course = veneer.TrainConfig(
        steps=1,
        lr=0.01,
        warmup=0,
        tokens_per_step=1000,
        clip=0,
        tokens_per_batch=tokens_per_batch,
        **kind.training,
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", note)
        events = [e for e in veneer.train(model, rows, course) if isinstance(e, Step)]
    return events[0], gradients
