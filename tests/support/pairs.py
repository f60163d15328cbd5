"""Pairs and judged answers of random tokens, and what an objective should make of them: by each
paper's formula over rows that the model computes one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import veneer
from support.random_adapters import VOCAB
from veneer.data.encode import UNLABELLED, Example
from veneer.objectives.config import Objective

# Beta is such that the loss is bent: with the papers' it is nearly straight over so few tokens.
OBJECTIVES = {
    "dpo": Objective("dpo", beta=0.7, label_smoothing=0.1),
    "ipo": Objective("ipo", beta=0.3),
    "simpo": Objective("simpo", beta=1.5, simpo_margin=0.4),
    "orpo": Objective("orpo", beta=0.6),
    "cpo": Objective("cpo", beta=0.5, nll_weight=0.3),
    "kto": Objective("kto", beta=0.8, desirable_weight=1.3, undesirable_weight=0.6),
}


def pairs(count: int = 5, *, seed: int = 0) -> list[Example]:
    """Return pairs whose prompts and answers are of unequal lengths, every other one desirable."""
    draw = torch.Generator().manual_seed(seed)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    rows = []
    for number in range(count):
        prompt, answers = some(1, 8), [some(1, 10), some(1, 10)]
        tokens = [token for answer in answers for token in prompt + answer]
        labels = [label for answer in answers for label in [UNLABELLED] * len(prompt) + answer]
        second = len(prompt) + len(answers[0])
        where = f"row:{number}"
        rows.append(Example(tokens, labels, where, 0, second=second, desirable=number % 2 == 0))
    return rows


def log_probabilities(model: Any, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return log p of the label tokens of both rows of each example, (examples, 2), and how many
    they are, by the model's own forward of one row at a time."""
    sums, counts = [], []
    for example in rows:
        for row in (slice(example.second), slice(example.second, None)):
            tokens = torch.tensor([example.tokens[row]])
            labels = torch.tensor(example.labels[row])[1:]
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            log_p = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            sums.append(log_p[labels != UNLABELLED].sum())
            counts.append(int((labels != UNLABELLED).sum()))
    return torch.stack(sums).view(-1, 2), torch.tensor(counts).view(-1, 2)


def expected_loss(objective: Objective, model: Any, rows: Sequence[Example]) -> Tensor:
    """Return the loss over all rows, by the papers."""
    log_p, tokens = log_probabilities(model, rows)
    with torch.no_grad():
        base = copy.deepcopy(model)
        veneer.use(base, None)
        reference, _ = log_probabilities(base, rows)
    ratios, mean = log_p - reference, log_p / tokens
    beta, name = objective.strength, objective.objective
    nll = -log_p[:, 0].sum() / tokens[:, 0].sum()
    match name:
        case "dpo":
            x, e = beta * (ratios[:, 0] - ratios[:, 1]), objective.label_smoothing
            return (-(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)).mean()
        case "ipo":
            x = (ratios / tokens)[:, 0] - (ratios / tokens)[:, 1]
            return (x - 1 / (2 * beta)).square().mean()
        case "simpo":
            x = beta * mean[:, 0] - beta * mean[:, 1] - objective.simpo_margin
            return -F.logsigmoid(x).mean()
        case "orpo":
            odds = mean.exp() / (1 - mean.exp())
            return nll - beta * F.logsigmoid((odds[:, 0] / odds[:, 1]).log()).mean()
        case "cpo":
            x = beta * (log_p[:, 0] - log_p[:, 1])
            return objective.nll_weight * nll - F.logsigmoid(x).mean()
    kl = ratios[:, 1].detach().mean().clamp(min=0)
    good = torch.tensor([row.desirable for row in rows])
    gains = objective.desirable_weight * (1 - torch.sigmoid(beta * (ratios[:, 0] - kl)))
    losses = objective.undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratios[:, 0])))
    return torch.where(good, gains, losses).mean()
