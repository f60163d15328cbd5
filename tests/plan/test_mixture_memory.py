"""Law 10 for a mixture of experts: what a run takes is what was planned for it, to a tenth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measured_run import LENGTH
from mixture_run import ROWS
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from support.random_adapters import tokenizer
from veneer import LoRA
from veneer.cli.app import run
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan

pytestmark = pytest.mark.slow
CONFIG = Qwen3MoeConfig(
    vocab_size=8192,
    hidden_size=1024,
    moe_intermediate_size=512,
    intermediate_size=2048,
    num_experts=32,
    num_experts_per_tok=4,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM._from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(home)
    tokenizer(CONFIG.vocab_size).save_pretrained(home)
    return home


@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (16, {}),
        (4, {"method": "qlora"}),
        (0, {"method": "qlora", "mapped": True}),
    ],
)
def test_a_mixture_takes_the_memory_that_is_planned(bits, settings, home, tmp_path):
    if not bits:
        assert run(["quantize", str(home), str(tmp_path / "quantized")]) == 0
        home = tmp_path / "quantized"
    script = Path(__file__).with_name("mixture_run.py")
    command = [sys.executable, str(script), str(home), str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    sizes = find_sizes(home)
    config = PlanConfig(tokens_per_batch=ROWS * LENGTH, max_length=LENGTH, **settings)
    plan = make_plan(config, sizes, adapted_layers(sizes, LoRA(targets="all")))
    assert plan.trained.count == measured["trained"]
    assert measured["notices"] == []
    print(f"planned / measured: {plan.memory.peak / measured['peak']:.3f}")
    assert plan.memory.peak == pytest.approx(measured["peak"], rel=0.1)
