"""The divergence from a teacher, in float64, against what is written out over all tokens."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError
from veneer.kernels.cross_entropy import PLAIN, Labelled, Logits, labelled_cross_entropy, losses_of
from veneer.objectives.distillation import (
    DistanceFromTeacher,
    Likeliest,
    divergence_of,
    forward_kl,
)

ROWS, VOCAB = 5, 13
CAPPED = Logits(scale=0.7, softcap=3.0)
Divergent = pytest.mark.parametrize("divergence", ["forward", "reverse"])


def numbers(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def taught(z: Tensor, k: int, *, logits: Logits, temperature: float, divergence: Any) -> Any:
    """Return the distance from a teacher with these logits."""
    noted = Likeliest(k, temperature)
    noted(z, 0, torch.empty_like(z), logits)
    # What is kept is float32; here the widest numbers are to be seen.
    y = logits(z) / temperature
    log_p = y.log_softmax(-1)
    tokens = noted.tokens[0].long()
    own = log_p.gather(1, tokens)
    others = log_p.scatter(1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    exact = torch.cat([own, others], dim=1)
    torch.testing.assert_close(noted.log_p[0], exact.float())
    way = divergence_of(veneer.Objective("distill", teacher="t", divergence=divergence))
    return DistanceFromTeacher(tokens, exact, way, temperature)


def written_out(z: Tensor, teacher: Any, *, logits: Logits) -> Tensor:
    """Return the divergence of each row, (rows,), bucket by bucket."""
    q = (logits(z) / teacher.temperature).softmax(-1)
    losses = []
    for row, tokens in enumerate(teacher.tokens.tolist()):
        buckets = [q[row, token] for token in tokens]
        if others := [q[row, token] for token in range(q.shape[1]) if token not in tokens]:
            buckets.append(torch.stack(others).sum())
        own = torch.stack(buckets)
        p = teacher.log_p[row, : len(own)].exp()
        first, second = (p, own) if teacher.divergence is forward_kl else (own, p)
        losses.append((first * (first / second).log()).sum() * teacher.temperature**2)
    return torch.stack(losses)


@Divergent
@pytest.mark.parametrize(("logits", "temperature"), [(PLAIN, 1.0), (CAPPED, 1.7)])
@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_loss_and_gradient_are_those_written_out(divergence, logits, temperature, k):
    """With k the whole vocabulary, that is the divergence itself."""
    z, of_teacher = numbers(0, ROWS, VOCAB).requires_grad_(), numbers(1, ROWS, VOCAB)
    options = {"temperature": temperature, "divergence": divergence}
    teacher = taught(of_teacher, k, logits=logits, **options)
    expected = written_out(z, teacher, logits=logits)
    (exactly,) = torch.autograd.grad(expected.sum(), z)
    losses, gradient = teacher(z.detach(), 0, torch.empty_like(z), logits)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, exactly, rtol=1e-11, atol=1e-13)
    if k == VOCAB and divergence == "forward":
        p, q = ((logits(x) / temperature).log_softmax(-1) for x in (of_teacher, z.detach()))
        full = (p.exp() * (p - q)).sum(-1) * temperature**2
        torch.testing.assert_close(losses, full, rtol=1e-12, atol=1e-13)


@Divergent
@pytest.mark.parametrize("k", [3, VOCAB])
def test_a_teacher_equal_to_the_student_teaches_nothing(divergence, k):
    z = numbers(0, ROWS, VOCAB)
    teacher = taught(z, k, logits=CAPPED, temperature=1.3, divergence=divergence)
    losses, gradient = teacher(z, 0, torch.empty_like(z), CAPPED)
    assert losses.abs().max() <= 1e-14
    assert gradient.abs().max() <= 1e-14


@pytest.mark.parametrize("trains", [False, True])
def test_chunks_of_rows_are_all_rows(trains, monkeypatch):
    """Through a head that is frozen, and one that trains, with another weight for each loss."""
    monkeypatch.setattr(DistanceFromTeacher, "step_logits", 2 * VOCAB)
    head = nn.Linear(6, VOCAB, dtype=torch.float64).requires_grad_(trains)
    hidden, weights = numbers(2, 9, 6).requires_grad_(), numbers(3, ROWS)
    teacher = taught(
        numbers(1, ROWS, VOCAB), 4, logits=PLAIN, temperature=1.0, divergence="forward"
    )
    labelled = Labelled.of(torch.tensor([-100, 3, 1, -100, 2, 5, -100, 4, -100]))
    losses = labelled_cross_entropy(hidden, labelled, head, token_loss=teacher)
    whole = written_out(head(hidden[labelled.rows]), teacher, logits=PLAIN)
    by_logits = losses_of(head(hidden), labelled, teacher)
    inputs = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    expected = torch.autograd.grad((whole * weights).sum(), inputs)
    for ours, rounding in ((losses, 1e-6), (by_logits, 1e-5)):  # float32; and of float32 logits
        torch.testing.assert_close(ours.double(), whole, rtol=rounding, atol=rounding)
        got = torch.autograd.grad((ours * weights).sum(), inputs)
        for gradient, exactly in zip(got, expected, strict=True):
            torch.testing.assert_close(gradient, exactly, rtol=1e-4, atol=rounding)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "name the directory of another adapter"),
        ({"teacher": "t", "divergence": "both"}, "divergence is 'both'"),
        ({"teacher": "t", "teacher_top_k": 0}, "teacher_top_k is 0"),
        ({"teacher": "t", "distill_temperature": 0}, "distill_temperature is 0"),
        ({"teacher": "t", "beta": 0.1}, "beta would do nothing with distill"),
        ({"objective": "sft", "teacher": "t"}, "teacher would do nothing with sft"),
        ({"objective": "dpo", "divergence": "reverse"}, "divergence would do nothing with dpo"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        veneer.Objective(**{"objective": "distill", **settings})
