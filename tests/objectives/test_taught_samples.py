"""The divergence of drawn tokens from a teacher that is there, beside its formula and TRL."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.random_adapters import ids, shake
from support.tiny_models import tiny
from veneer.adapter.use import acting
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.errors import ConfigError
from veneer.fused.forward import choose_forward
from veneer.kernels.cross_entropy import PLAIN, Logits
from veneer.objectives.config import Objective
from veneer.objectives.criterion import StepCounts
from veneer.objectives.distillation import divergence_of
from veneer.objectives.taught_samples import DistanceFromLogits, TaughtSamples
from veneer.training.begin import let_train
from veneer.training.live_teacher import LiveTeacher

ROWS, VOCAB = 5, 13
CAPPED = Logits(scale=0.7, softcap=3.0)
SOME = ("q_proj", "v_proj", "down_proj")
PROMPTS, LENGTHS, GROUP = (5, 9), (3, 7, 1, 6), 2
# TRL's beta: 0 is forward, 1 is reverse.
BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}
Divergent = pytest.mark.parametrize("divergence", BETAS)


def objective_of(divergence, **settings) -> Objective:
    if divergence == "jsd":
        settings["jsd_beta"] = BETAS["jsd"]
    return Objective("distill", teacher="t", on_policy=True, divergence=divergence, **settings)


def written_out(divergence: str, q: Tensor, p: Tensor) -> Tensor:
    """Return the divergence of each row, by its formula; q, p (rows, vocab)."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first / second).log()).sum(-1)

    beta = BETAS[divergence]
    if divergence != "jsd":
        return kl(p, q) if divergence == "forward" else kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def numbers(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


@Divergent
@pytest.mark.parametrize(("logits", "temperature"), [(PLAIN, 1.0), (CAPPED, 1.7)])
@pytest.mark.parametrize("theirs", [VOCAB - 2, VOCAB, VOCAB + 4])
def test_loss_and_gradient_are_those_written_out(divergence, logits, temperature, theirs):
    """In chunks of rows, and also where one of both models has tokens that the other lacks."""
    z, of_teacher = numbers(0, ROWS, VOCAB).requires_grad_(), numbers(1, ROWS, theirs)
    targets, both = torch.tensor([3, 0, 10, 4, 4]), min(VOCAB, theirs)
    q = (logits(z)[:, :both] / temperature).softmax(-1)
    p = (of_teacher[:, :both] / temperature).softmax(-1)
    expected = written_out(divergence, q, p) * temperature**2
    (exactly,) = torch.autograd.grad(expected.sum(), z)
    distance = DistanceFromLogits(
        lambda first, count: of_teacher[first : first + count],
        *(targets, divergence_of(objective_of(divergence)), temperature),
    )
    distance.log_p = distance.log_p.double()
    for first, count in ((0, 3), (3, 2)):
        here = slice(first, first + count)
        chunk = z.detach()[here].clone()
        losses, gradient = distance(
            chunk, first, chunk, logits
        )  # which are one tensor, as by a head
        torch.testing.assert_close(losses, expected.detach()[here], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient, exactly[here], rtol=1e-10, atol=1e-13)
    own = logits(z.detach()).log_softmax(-1)[torch.arange(ROWS), targets]
    torch.testing.assert_close(distance.log_p, own, rtol=1e-12, atol=1e-13)


def samples() -> list[Example]:
    """Return rows of a prompt and an answer each, of which the answer is learnt."""
    rows = []
    for i, length in enumerate(LENGTHS):
        prompt = ids(1, PROMPTS[i // GROUP], seed=i // GROUP)[0].tolist()
        answer = ids(1, length, seed=10 + i)[0].tolist()
        labels = [UNLABELLED] * len(prompt) + answer
        rows.append(Example(prompt + answer, labels, f"sample {i}", 0))
    return rows


def both_adapters(*, head: bool = False) -> nn.Module:
    """Return a base with the adapters of student and teacher, of which the student's acts. head:
    the teacher adapts it too."""
    targets = [*SOME, "lm_head"] if head else "all"
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=4, targets=targets), name="teacher")
    shake(model, seed=7, size=0.2)
    veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name="student")
    veneer.use(model, "student")
    let_train(model, "student")
    return shake(model, size=0.2).eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def by_trl(model: nn.Module, rows: list[Example], objective: Objective) -> tuple[Tensor, dict]:
    """Return the loss of TRL's GKDTrainer over rows one by one, and its gradients."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for row in rows:
        tokens, labels = torch.tensor([row.tokens]), torch.tensor([row.labels])
        with torch.no_grad(), acting(model, "teacher"):
            theirs = model(input_ids=tokens, use_cache=False).logits
        own = model(input_ids=tokens, use_cache=False).logits
        total = total + GKDTrainer.generalized_jsd_loss(
            *(own[:, :-1], theirs[:, :-1], labels[:, 1:]),
            beta=BETAS[objective.divergence],
            temperature=objective.distill_temperature,
            reduction="sum",
        )
    # TRL leaves the gradients of a temperature as small as it makes them.
    loss = total / sum(LENGTHS) * objective.distill_temperature**2
    weights = trained(model)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return loss.detach(), dict(zip(weights, gradients, strict=True))


@pytest.mark.slow
@Divergent
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_trl(divergence, temperature):
    model, rows = both_adapters(), samples()
    forward, _ = choose_forward(model, rows, answer_one_prompt=True)
    assert forward.shares
    objective = objective_of(divergence, distill_temperature=temperature)
    teacher = LiveTeacher(model, partial(acting, model, "teacher"), "")
    drawn = [[-1.0] * length for length in LENGTHS]
    criterion = TaughtSamples(objective, partial(teacher.on, forward), drawn)
    counts = StepCounts(sum(LENGTHS), (len(rows),))
    ours = torch.zeros(())
    with forward.installed(model):
        for indices in ([2, 1, 3], [0]):  # in several passes, in any order
            batch = pack(rows, indices)
            losses = forward.losses(model, batch, criterion.token_loss(batch, model.device))
            outcome = criterion(losses, batch, counts)
            loss = outcome.loss / criterion.divisor(counts)
            loss.backward()
            ours = ours + loss.detach()
    gradients = {name: weight.grad.clone() for name, weight in trained(model).items()}
    loss, theirs = by_trl(model, rows, objective)
    exact, expected = by_trl(copy.deepcopy(model).double(), rows, objective)
    assert_no_further(ours, loss, exact, least=1.0)
    assert_gradients_no_further(gradients, theirs, expected)
    with torch.no_grad():
        log_p = -forward.losses(model, pack(rows, [0]))
    torch.testing.assert_close(criterion.old[0], log_p, rtol=1e-4, atol=1e-5)
    assert float(criterion.largest_gap) == pytest.approx(
        max(float((old + 1).abs().max()) for old in criterion.old.values())
    )


def test_packed_padded_and_one_by_one_are_as_far():
    """With a head that the teacher adapts, and where a model makes the logits of all rows."""
    model, rows = both_adapters(head=True), samples()
    forward, _ = choose_forward(model, rows)
    batch = pack(rows, [2, 0, 3, 1])
    with torch.no_grad(), acting(model, "teacher"):
        expected = torch.cat(
            [
                model(input_ids=torch.tensor([rows[i].tokens]), use_cache=False).logits[
                    0, -1 - LENGTHS[i] : -1
                ]
                for i in (2, 0, 3, 1)
            ]
        )
    for settings in ({}, {"packed": False}, {"packed": False, "alone": True}, {"head": None}):
        teacher = LiveTeacher(model, partial(acting, model, "teacher"), "")
        logits = teacher.on(replace(forward, **settings), batch)
        count = len(expected)
        ours = torch.cat([logits(first, 3) for first in range(0, count, 3)])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"jsd_beta": 1.0, "divergence": "jsd"},
            "jsd_beta is 1.0, but must be above 0 and below 1",
        ),
        ({"jsd_beta": 0.3}, "jsd_beta would do nothing with divergence reverse"),
        ({"teacher_top_k": 8}, "teacher_top_k would do nothing with on_policy"),
        ({"teacher": None}, "distill learns from a teacher"),
        ({"objective": "dpo", "teacher": None}, "on_policy would do nothing with dpo"),
        ({"on_policy": "yes"}, "on_policy is 'yes', but must be true or false"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        Objective(**{"objective": "distill", "teacher": "t", "on_policy": True, **settings})


def test_what_is_usual_is_reverse_on_samples_and_forward_on_answers():
    given = Objective("distill", teacher="t")
    assert given.divergence == Objective().divergence == "forward"
    own = objective_of(None)
    assert (own.divergence, own.shape, own.asks) == ("reverse", "prompts", None)
    assert own.course["divergence"] == "reverse"
    assert math.isclose(own.share_of_rate, 1.0)
