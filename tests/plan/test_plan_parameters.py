"""The planner's parameters against what `attach` trains in real models, what PEFT does, and what
papers count."""

import copy
from functools import cache

import pytest
import torch
from architectures import ALL, VARIANTS
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.tiny_models import OTHER_DECODERS
from veneer import LoRA, Method
from veneer.adapter.attach import attach
from veneer.adapter.report import report_targets
from veneer.models import minigpt
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes, sizes_of
from veneer.plan.methods import adapted_layers, trained_by

EXPERTS = {"mixtral": "experts.gate_up_proj,experts.down_proj,q_proj", "gpt_oss": "gate_up_proj"}
MIXTURES = ("qwen2_moe", "qwen3_moe", *EXPERTS)
EVERY = ALL | VARIANTS | {name: OTHER_DECODERS[name] for name in MIXTURES}
# What PEFT finds by names in a configuration, of which MiniGPT has its own.
MINIGPT = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
LORAS = [
    {"targets": "attention"},
    {"targets": "qv", "rank": 4},
    {"targets": "mlp", "rank": 3},
    {"targets": "all", "layers": "-1:"},
    {"targets": "all", "rank": 2, "rank_pattern": {r".*\.1\..*": 5}},
    {"targets": r"re:\.0\..*(proj|dense|attn|query)"},
    {"targets": "all", "lora_fa": True, "rank": 2},
    {"targets": "qv", "init": "olora", "rank": 3},
]


def model_of(name, device="cpu"):
    minigpt.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(EVERY[name]))
    return model.to_empty(device=device)


@cache
def sizes(name):
    return sizes_of(EVERY[name])


def planned(name, lora=None, **settings):
    config = PlanConfig(**settings)
    adapted = adapted_layers(sizes(name), lora) if lora else ()
    trained = trained_by(config, sizes(name), adapted)
    assert sum(trained.each) == trained.count  # by which an optimizer's moments are planned
    return trained.count


def numbers(parameters):
    return sum(parameter.numel() for parameter in parameters)


@cache
def skeleton(name):
    """Return a model on the meta device, to count in and not to change."""
    return model_of(name, "meta")


def trains(model):
    return numbers(weight for weight in model.parameters() if weight.requires_grad)


def attached(name, config):
    return trains(attach(model_of(name), config))


def peft_trains(name, config):
    return trains(get_peft_model(model_of(name), config))


def test_at_least_twelve_architectures_are_tried():
    assert len({config.model_type for config in EVERY.values()}) >= 12


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.thinned(one_in=3, first=2)
def test_full_training_and_freezing_train_what_the_model_has(name, tmp_path):
    model = skeleton(name)
    assert planned(name, method="full") == numbers(model.parameters())
    # What a saved configuration leaves out is filled in as transformers does.
    EVERY[name].save_pretrained(tmp_path)
    assert find_sizes(tmp_path) == sizes(name)
    for count in (1, 2):
        stacks = [f"{stack}.{i}." for stack in ("layers", "h", "layer") for i in (0, 1)[-count:]]
        own = [w for path, w in model.named_parameters() if any(s in path for s in stacks)]
        assert planned(name, method="freeze", trained_blocks=count) == numbers(own)
    for beside in ({"train_head": True}, {"train_norms": True}):
        settings = {"method": "freeze", "trained_blocks": 1, **beside}
        assert planned(name, **settings) == attached(name, Method(**settings))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.thinned(one_in=3, first=1)
def test_lora_trains_what_veneer_attaches(name):
    for settings in LORAS:
        lora = LoRA(**settings)
        assert planned(name, lora) == report_targets(skeleton(name), lora).trained
        assert planned(name, lora) == attached(name, lora), settings


@pytest.mark.parametrize("name", EXPERTS)
def test_lora_over_stacks_of_experts_trains_what_veneer_attaches(name):
    for settings in ({}, {"expert_rank": 3}, {"expert_rank": 2, "shared_expert_a": True}):
        lora = LoRA(rank=2, targets=EXPERTS[name], **settings)
        assert planned(name, lora) == attached(name, lora), settings


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.thinned(one_in=2)
def test_lora_and_dora_train_what_peft_trains(name):
    lora = LoRA(rank=4, targets="all", expert_rank=2 if name in MIXTURES else None)
    lines = adapted_layers(sizes(name), lora)
    layers = [line.path for line in lines if not line.layer.is_stack]
    stacks = [line.path for line in lines if line.layer.is_stack]
    theirs = LoraConfig(
        r=4, target_modules=layers, target_parameters=stacks, rank_pattern=dict.fromkeys(stacks, 2)
    )
    assert planned(name, lora) == peft_trains(name, theirs)
    theirs = LoraConfig(r=4, target_modules=layers, use_dora=True)  # which is not over stacks
    assert planned(name, LoRA(rank=4, targets=layers), method="dora") == peft_trains(name, theirs)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "roberta"])
@pytest.mark.thinned(one_in=3)
def test_virtual_tokens_are_those_of_veneer_and_of_peft(name):
    known = MINIGPT if name == "minigpt" else {}
    counted = {
        "prompt": (planned(name, method="prompt", virtual_tokens=7), PromptTuningConfig, {}),
        "prefix": (planned(name, method="prefix", virtual_tokens=7), PrefixTuningConfig, {}),
        "prefix by an MLP": (
            planned(name, method="prefix", virtual_tokens=7, prefix_mlp=9),
            PrefixTuningConfig,
            {"prefix_projection": True, "encoder_hidden_size": 9},
        ),
    }
    for title, (count, kind, settings) in counted.items():
        method = Method(
            title.split()[0],
            virtual_tokens=7,
            prefix_mlp=settings.get("encoder_hidden_size"),
        )
        assert count == attached(name, method)
        # PEFT finds widths by their names; Falcon's key heads go by another name, and the
        # embedding of OPT-350M is narrower than its layers.
        if "falcon" not in name and not (name == "opt 350m's" and title == "prompt"):
            theirs = kind(task_type="CAUSAL_LM", num_virtual_tokens=7, **known, **settings)
            assert count == peft_trains(name, theirs)


@pytest.mark.parametrize(
    ("name", "rank", "targets", "parameters"),
    [
        # Hu et al. 2021 (LoRA), tables 2 and 4: RoBERTa 0.3 M and 0.8 M, GPT-3 with 175 B
        # 4.7 M and 37.7 M.
        ("roberta-base", 8, "qv", 294_912),
        ("roberta-large", 8, "qv", 786_432),
        ("gpt-3", 1, "qv", 4_718_592),
        ("gpt-3", 8, "qv", 37_748_736),
        # A projection of 8192² at rank 16 is 262,144, and 80 blocks have two; k and v are narrower.
        ("llama-2-70b", 16, "q_proj,o_proj", 80 * 2 * 262_144),
        ("llama-2-70b", 16, "attention", 65_536_000),
    ],
)
def test_tables_of_papers(name, rank, targets, parameters):
    model = find_sizes(name)
    adapted = adapted_layers(model, LoRA(rank=rank, targets=targets))
    assert trained_by(PlanConfig(), model, adapted).count == parameters


@pytest.mark.parametrize(("method", "per_cent"), [("lora", 0.83), ("dora", 0.84)])
def test_the_table_of_dora_counts_adapters_with_all_parameters(method, per_cent):
    # Liu et al. 2024, table 1: LLaMA-7B, rank 32, on q, k, v, up and down.
    model = find_sizes("llama-7b")
    adapted = adapted_layers(model, LoRA(rank=32, targets="q_proj,k_proj,v_proj,up_proj,down_proj"))
    count = trained_by(PlanConfig(method=method), model, adapted).count
    assert round(100 * count / (model.description.parameters + count), 2) == per_cent


def test_one_square_projection_of_70b_is_the_described_262_144():
    model = find_sizes("llama-2-70b")
    lora = LoRA(rank=16, targets="model.layers.0.self_attn.q_proj")
    (line,) = adapted_layers(model, lora)
    count = trained_by(PlanConfig(), model, (line,)).count
    assert count == 262_144
    assert round(100 * count / line.layer.parameters, 2) == 0.39
