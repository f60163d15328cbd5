"""LoRA+: which weights learn how fast, by the authors' groups as PEFT has them."""

import dataclasses
import itertools
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import veneer
from support.random_adapters import (
    examples,
    same,
    targets_named,
    tokenizer,
    trained_weights,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, quantized, tiny
from veneer.training.events import Step
from veneer.training.lora_plus import EMBEDDING_LR, lr_ratios

LR = 3e-4


def ours(model: Any, ratio: float) -> dict[str, float]:
    """Return each adapted layer's learning rates as {path.A or B: lr}."""
    rates = {}
    for name, times in lr_ratios(model, ratio=ratio, lr=LR).items():
        path, _, weight = name.partition(".adapters.")
        rates[f"{path}.{weight[-1]}"] = times * LR
    return rates


def theirs(architecture: str, targets: list[str], ratio: float) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny(architecture), peft.LoraConfig(r=2, target_modules=targets)
        )
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio)
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            path, _, factor = names[id(weight)].partition(".lora_")
            factor = factor.removeprefix("embedding_")[0]
            rates[f"{path.removeprefix('base_model.model.')}.{factor}"] = group["lr"]
    return rates


@pytest.mark.parametrize("ratio", [0.25, 4.0, 16.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_groups_are_the_authors(architecture, ratio):
    model = tiny(architecture)
    config = veneer.LoRA(rank=2, targets=targets_named(model, "everything"))
    veneer.attach(model, config)
    rates = ours(model, ratio)
    targets = sorted({path.rpartition(".")[0].rpartition(".")[2] for path in rates})
    expected = theirs(architecture, targets, ratio)
    assert rates.keys() == expected.keys()
    for name, lr in expected.items():
        assert rates[name] == pytest.approx(lr, rel=1e-12), name
    assert {round(lr, 12) for lr in rates.values()} == {
        round(lr, 12) for lr in (LR, LR * ratio, EMBEDDING_LR)
    }


def test_rows_of_new_tokens_learn_as_A_does():
    model = tiny("llama")
    new = with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.LoRA(rank=2))
    for rows in new.parameters():
        rows.requires_grad_(True)
    ratios = lr_ratios(model, ratio=8.0, lr=LR)
    assert {times for name, times in ratios.items() if name.endswith("rows")} == {1.0}


def course(model: Any, ratio: float | None) -> dict[str, torch.Tensor]:
    config = veneer.TrainConfig(
        steps=1, lr=0.01, lora_plus_ratio=ratio, warmup=0, tokens_per_step=40
    )
    losses = [
        e.loss
        for e in veneer.train(model, examples([12, 9, 15, 20]), config)
        if isinstance(e, Step)
    ]
    assert len(losses) == 1
    return trained_weights(model)


@pytest.mark.parametrize("base", [tiny, quantized])
def test_training_follows_the_ratio(base):
    def new() -> Any:
        return veneer.attach(base("llama"), veneer.LoRA(rank=2), seed=0)

    start = trained_weights(new())
    plain, one, fast = (course(new(), ratio) for ratio in (None, 1.0, 8.0))
    assert same(one, plain)
    for name in start:
        # A first step of Adam's is as long as the learning rate, whatever the gradient.
        moved = [float((after[name] - start[name]).abs().median()) for after in (fast, plain)]
        expected = 8.0 if name.endswith("lora_B") else 1.0
        assert moved[0] == pytest.approx(expected * moved[1], rel=1e-3), name


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    def new() -> Any:
        return veneer.attach(tiny("qwen2"), veneer.LoRA(rank=2, targets="all"), seed=0)

    config = veneer.TrainConfig(
        steps=5, lr=0.01, lora_plus_ratio=6.0, tokens_per_step=40, save_every=2
    )
    rows = examples([12, 9, 15, 20, 7, 18])
    whole = new()
    list(veneer.train(whole, rows, config))
    first = new()
    events = veneer.train(first, rows, config, directory=tmp_path)
    list(itertools.takewhile(lambda e: not (isinstance(e, Step) and e.step == 4), events))
    events.close()
    second = new()
    list(veneer.train(second, rows, config, directory=tmp_path, resume=True))
    assert same(trained_weights(second), trained_weights(whole))
    other = dataclasses.replace(config, lora_plus_ratio=4.0)
    with pytest.raises(veneer.TrainingError, match="lora_plus_ratio"):
        list(veneer.train(new(), rows, other, directory=tmp_path, resume=True))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_ratios_that_cannot_be(ratio):
    with pytest.raises(veneer.ConfigError, match="lora_plus_ratio"):
        veneer.TrainConfig(lora_plus_ratio=ratio)
