"""Law 6 over a base that drops by itself: its masks, too, come from the state that was saved."""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import veneer
from support.random_adapters import examples, same, trained_weights
from support.tiny_models import CONFIGS
from veneer.training.events import Step

ROWS = examples([11, 7, 16, 9, 13, 8])
COURSE = veneer.TrainConfig(epochs=2, lr=0.02, tokens_per_step=20, save_every=1)


def go(directory: Path, *, seed: int, stop_at: int = 0) -> dict[str, Tensor]:
    """Train until the end or a step, in a process that starts with random numbers of its own."""
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    veneer.attach(model, veneer.LoRA(rank=2, targets="all", dropout=0.1), seed=0)
    torch.manual_seed(seed)
    steps = [0]
    for event in veneer.train(
        model,
        ROWS,
        COURSE,
        directory=directory,
        resume=seed > 0,
        should_stop=lambda: steps[-1] == stop_at,
    ):
        if isinstance(event, Step):
            steps.append(event.step)
    return trained_weights(model)


def test_a_base_that_drops_goes_on(tmp_path):
    whole = go(tmp_path / "whole", seed=0)
    go(tmp_path / "pieces", seed=0, stop_at=2)
    assert same(go(tmp_path / "pieces", seed=1), whole)
