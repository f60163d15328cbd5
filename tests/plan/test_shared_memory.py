"""Law 10 for several processes: what each takes is what was planned for it, to a tenth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measured_run import LENGTH
from shared_run import ROWS
from transformers import LlamaConfig, LlamaForCausalLM

from support.random_adapters import tokenizer
from veneer import LoRA
from veneer.plan.config import PlanConfig
from veneer.plan.devices import DevicePlan
from veneer.plan.find import find_sizes
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan

pytestmark = pytest.mark.slow
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(home)
    tokenizer(CONFIG.vocab_size).save_pretrained(home)
    return home


@pytest.mark.parametrize("shard", ["none", "base"])
def test_a_process_takes_the_memory_that_is_planned(shard, home, tmp_path):
    script = str(Path(__file__).with_name("shared_run.py"))
    commands = (
        [sys.executable, script, str(home), shard, str(rank), "2", str(tmp_path / "meeting")]
        for rank in range(2)
    )
    started = [subprocess.Popen(x, stdout=subprocess.PIPE, text=True) for x in commands]
    printed = [process.communicate()[0] for process in started]
    measured = [json.loads(text.splitlines()[-1]) for text in printed]
    sizes = find_sizes(home)
    config = PlanConfig(tokens_per_batch=ROWS * LENGTH, max_length=LENGTH)
    plan = make_plan(config, sizes, adapted_layers(sizes, LoRA(targets="all")))
    way = DevicePlan(plan, 2, shard)
    for process in measured:
        print(f"{shard}: planned / measured: {way.peak / process['peak']:.3f}", way.peak, process)
    for process in measured:
        assert way.peak == pytest.approx(process["peak"], rel=0.1)
