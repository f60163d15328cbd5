"""TRL's losses, and the gradients of its adapters, are ours: law 3, with a model in float64 as what
both are compared with."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.pairs import OBJECTIVES, expected_loss, log_probabilities, pairs
from support.plain import Float64
from support.random_adapters import shake, tokenizer
from support.tiny_models import tiny
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.objectives.config import Objective
from veneer.processes.world import ALONE
from veneer.training.reference import criteria_over
from veneer.training.step import counts_of

pytestmark = pytest.mark.slow

ROWS = pairs(4)
OURS = OBJECTIVES | {"dpo": Objective("dpo", beta=0.7)}  # TRL's sigmoid loss is not smoothed


def ids_of(example: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of a prompt and of its two answers."""
    prompt = next(i for i, label in enumerate(example.labels) if label >= 0)
    chosen, rejected = example.tokens[: example.second], example.tokens[example.second :]
    return chosen[:prompt], chosen[prompt:], rejected[prompt:]


def cut(example: Any, longest: int | None) -> Any:
    """Return a pair of which each row has at most so many tokens."""
    second = example.second
    tokens = [example.tokens[:second][:longest], example.tokens[second:][:longest]]
    labels = [example.labels[:second][:longest], example.labels[second:][:longest]]
    return replace(
        example,
        tokens=[*tokens[0], *tokens[1]],
        labels=[*labels[0], *labels[1]],
        second=len(tokens[0]),
    )


def by_trainer(
    name: str, model: Any, base: Tensor, place: Any, *, longest: int | None = None
) -> Tensor:
    """Return the loss that TRL's trainer computes of a padded batch. base: the log-probabilities
    that the reference gives, (rows, 2); longest: the tokens to which the trainer cuts rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    objective = OURS[name]
    common: dict[str, Any] = {
        "output_dir": str(place),
        "beta": objective.strength,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
        "max_length": longest,
    }
    batch = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids_of(r), strict=True))
        for r in ROWS
    ]
    if name == "kto":
        some = Dataset.from_list(
            [{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)]
        )
        trainer: Any = KTOTrainer(
            model=model,
            args=KTOConfig(
                **common,
                desirable_weight=objective.desirable_weight,
                undesirable_weight=objective.undesirable_weight,
                per_device_train_batch_size=2,
            ),
            train_dataset=some,
            processing_class=tokenizer(),
        )
        batch = [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row["chosen_ids"],
                "KL_completion_ids": row["rejected_ids"],
                "label": example.desirable,
                "ref_logps": float(own),
                "ref_KL_logps": float(other),
            }
            for row, example, (own, other) in zip(batch, ROWS, base, strict=True)
        ]
    else:
        loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[name]
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**common, loss_type=loss_type),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer(),
        )
        for row, (chosen, rejected) in zip(batch, base.tolist(), strict=True):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    trainer.precompute_ref_logps = True
    return trainer._compute_loss(trainer.model, trainer.data_collator(batch), False)


def by_method(name: str, model: Any) -> Tensor:
    """Return the loss that a trainer's method makes of the model's log-probabilities."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    objective = OURS[name]
    log_p, tokens = log_probabilities(model, ROWS)
    chosen, rejected = (log_p if name == "cpo" else log_p / tokens).unbind(1)
    nll = -log_p[:, 0].sum() / tokens[:, 0].sum()
    asked: Any = SimpleNamespace(
        beta=objective.strength,
        alpha=0.0,
        cpo_alpha=objective.nll_weight if name == "cpo" else 0.0,
        label_smoothing=0.0,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        simpo_gamma=objective.simpo_margin,
        aux_loss_enabled=False,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        concatenated_forward=lambda *_: (chosen, rejected, *torch.zeros(2, 1), nll),
    )
    kind = ORPOTrainer if name == "orpo" else CPOTrainer
    asked.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, asked)
    asked.cpo_loss = partial(CPOTrainer.cpo_loss, asked)
    return kind.get_batch_loss_metrics(asked, model, {})[0]  # as it weighs the terms


@pytest.mark.parametrize(
    ("name", "longest"), [*((name, None) for name in OURS), ("dpo", 8), ("kto", 8)]
)
def test_losses_and_gradients_are_trls(name, longest, tmp_path):
    import peft

    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all")), size=0.2)
    objective = OURS[name]
    rows = [cut(row, longest) for row in ROWS]
    forward, _ = choose_forward(model, rows)
    (criterion,) = criteria_over(
        *(objective, {"train": rows}, model, forward),
        **{"identity": {}, "world": ALONE, "tokens_per_batch": 50},
    )
    batch = pack(rows, range(len(rows)))
    counts = counts_of(criterion, [(batch, True)], ALONE)
    loss = criterion(forward.losses(model, batch), batch, counts).loss / criterion.divisor(counts)
    weights = {n: w for n, w in model.named_parameters() if "lora_" in n}
    gradients = torch.autograd.grad(loss, weights.values())
    ours = {key(n): g for n, g in zip(weights, gradients, strict=True)}

    exact = copy.deepcopy(model).double()
    with Float64():
        expected = expected_loss(objective, exact, rows)
    wide = {n: w for n, w in exact.named_parameters() if "lora_" in n}
    exactly = zip(wide, torch.autograd.grad(expected, wide.values()), strict=True)

    veneer.save(model, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(
        tiny("llama"), str(tmp_path / "adapter"), is_trainable=True
    )
    with torch.no_grad(), theirs.disable_adapter():
        base, _ = log_probabilities(theirs, rows)
    if name in ("dpo", "ipo", "kto"):
        peer = by_trainer(name, theirs, base, tmp_path, longest=longest)
    else:
        peer = by_method(name, theirs)
    named = {n: w for n, w in theirs.named_parameters() if "lora_" in n and ".default." in n}
    peers = zip(named, torch.autograd.grad(peer, named.values()), strict=True)
    assert_no_further(loss.detach(), peer.detach(), expected.detach(), "the loss")
    assert_gradients_no_further(
        ours, {key(n): g for n, g in peers}, {key(n): g for n, g in exactly}
    )


def key(name: str) -> str:
    """Return a factor's name as a path of its layer, the same for both libraries."""
    for piece in ("base_model.model.", ".weight", ".default", ".adapters"):
        name = name.replace(piece, "")
    return name
