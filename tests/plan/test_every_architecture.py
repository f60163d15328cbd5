"""Every causal language model that transformers knows is planned, and exactly.

What trains is counted in the model that transformers builds, on the meta device in its usual size.
"""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.every_architecture import MODEL_TYPES, UNBUILT, usual_config
from veneer import LoRA, TargetError, VeneerWarning
from veneer.adapter.attach import attach
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan

# Of all kinds: plain, parallel, experts, shared experts, latent attention, state spaces, hybrids.
QUICK = {
    "llama",
    "gpt2",
    "falcon",
    "gemma2",
    "qwen2_moe",
    "deepseek_v3",
    "mamba2",
    "falcon_h1",
    "rwkv",
}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in MODEL_TYPES],
)
def test_an_architecture_is_planned_exactly(model_type, tmp_path):
    if model_type in UNBUILT:
        pytest.skip("transformers does not build it")
    config = usual_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    config.to_json_file(tmp_path / "config.json")
    sizes = find_sizes(tmp_path)
    full = make_plan(PlanConfig(method="full"), sizes)
    assert full.trained.count == sum(weight.numel() for weight in model.parameters())
    lora = LoRA(rank=1, targets="all")
    try:
        plan = make_plan(PlanConfig(), sizes, adapted_layers(sizes, lora))
    except TargetError:  # a model without linear layers
        with pytest.raises(TargetError):
            attach(model, lora)
        return
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # of experts
        attach(model, lora)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert plan.trained.count == trained
    assert plan.memory.activations.value > 0
