"""The planner's parameters against those of real models on the meta device, and of PEFT."""

import copy
import json

import pytest
import torch
from architectures import ALL, VARIANTS
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from veneer import LoRA, Method, TargetError
from veneer.adapter.attach import attach
from veneer.adapter.report import report_targets
from veneer.adapter.targets import adaptable_layers, resolve
from veneer.models import minigpt
from veneer.plan.config import PlanConfig
from veneer.plan.methods import adapted_layers, trained_by
from veneer.plan.presets import PRESETS
from veneer.plan.shapes import ARCHITECTURES, shape_of

EVERY = ALL | VARIANTS
# What PEFT finds by names in a configuration, of which MiniGPT has its own.
MINIGPT = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
CAUSAL = [name for name in EVERY if name != "roberta"]


def skeleton(name):
    minigpt.register()
    kind = AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(EVERY[name]))


def shape(name):
    return shape_of(EVERY[name].to_dict())


def planned(name, lora):
    return adapted_layers(shape(name), lora)


def trained(name, lora=None, **settings):
    config = PlanConfig(**settings)
    return trained_by(config, shape(name), planned(name, lora) if lora else ()).count


def numbers(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_every_architecture_is_tried():
    assert {config.model_type for config in ALL.values()} == set(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 12


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_is_where_it_is_in_the_real_model(name):
    theirs = {
        x.path: (x.shape, x.block, x.in_attention, x.is_head, x.is_linear)
        for x in adaptable_layers(skeleton(name))
    }
    ours = {
        x.path: (x.shape, x.block, x.in_attention, x.is_head, x.is_linear)
        for x in shape(name).adaptable
    }
    assert ours == theirs


@pytest.mark.parametrize("name", EVERY)
def test_full_training_trains_every_parameter(name):
    assert trained(name, method="full") == numbers(skeleton(name).parameters())


@pytest.mark.parametrize("name", EVERY)
def test_what_a_saved_config_leaves_out_is_known(name, tmp_path):
    EVERY[name].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert shape_of(saved) == shape(name)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", EVERY)
def test_freeze_trains_the_last_blocks(name, blocks):
    real = [
        weight
        for path, weight in skeleton(name).named_parameters()
        if any(
            f"{stack}.{i}." in path for stack in ("layers", "h", "layer") for i in (0, 1)[-blocks:]
        )
    ]
    assert trained(name, method="freeze", trained_blocks=blocks) == numbers(real)


@pytest.mark.parametrize("beside", ["train_head", "train_norms"])
@pytest.mark.parametrize("name", CAUSAL)
def test_freeze_trains_head_and_norms_too(name, beside):
    model = skeleton(name).to_empty(device="cpu")
    attach(model, Method("freeze", trained_blocks=1, **{beside: True}))
    real = numbers(w for w in model.parameters() if w.requires_grad)
    assert trained(name, method="freeze", trained_blocks=1, **{beside: True}) == real


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "attention"},
        {"targets": "qv", "rank": 4},
        {"targets": "mlp", "rank": 3},
        {"targets": "all", "layers": "-1:"},
        {"targets": "all", "rank": 2, "rank_pattern": {r".*\.1\..*": 5}},
        {"targets": r"re:\.0\..*(proj|dense|attn|query)"},
        {"targets": "all", "lora_fa": True, "rank": 2},
        {"targets": "qv", "init": "olora", "rank": 3},
    ],
    ids=lambda settings: str(settings["targets"]),
)
@pytest.mark.parametrize("name", EVERY)
def test_lora_trains_what_veneer_attaches(name, settings):
    lora, model = LoRA(**settings), skeleton(name)
    report = report_targets(model, lora)
    assert [(x.part.path, *x.part.shape, x.rank) for x in sorted_by_path(planned(name, lora))] == [
        (x.path, x.out, x.in_, x.rank) for x in sorted(report.lines, key=lambda x: x.path)
    ]
    assert trained(name, lora) == report.trained
    if name in CAUSAL:
        attach(model.to_empty(device="cpu"), lora)
        assert trained(name, lora) == numbers(w for w in model.parameters() if w.requires_grad)


def sorted_by_path(adapted):
    return sorted(adapted, key=lambda each: each.part.path)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_lora_and_dora_train_what_peft_trains(name, dora):
    lora = LoRA(rank=4, targets="all")
    paths = [x.part.path for x in planned(name, lora)]
    theirs = LoraConfig(r=4, target_modules=paths, use_dora=dora)
    model = skeleton(name)
    if dora:  # whose magnitudes start as norms, which the meta device cannot give
        model = model.to_empty(device="cpu")
    found = get_peft_model(model, theirs)
    count = numbers(w for w in found.parameters() if w.requires_grad)
    assert trained(name, lora, method="dora" if dora else "lora") == count


def peft_count(name, config):
    found = get_peft_model(skeleton(name).to_empty(device="cpu"), config)
    return numbers(w for w in found.parameters() if w.requires_grad)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "opt 350m's"])
def test_prompt_tuning_trains_what_peft_trains(name):
    # PEFT finds widths by their names, and MiniGPT has its own.
    known = (
        {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2} if name == "minigpt" else {}
    )
    theirs = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **known)
    assert trained(name, method="prompt", virtual_tokens=7) == peft_count(name, theirs)


def test_prompt_tuning_is_as_wide_as_the_embedding():
    assert trained("opt 350m's", method="prompt", virtual_tokens=7) == 7 * 16


@pytest.mark.parametrize("name", CAUSAL)
def test_prefix_tuning_trains_what_peft_trains(name):
    known = {}
    if name == "minigpt":
        known = MINIGPT
    elif EVERY[name].model_type == "falcon":  # whose key heads go by another name than PEFT knows
        heads = {"falcon": 1, "falcon 40b's": 2, "falcon rw's": 4}[name]
        known = {"token_dim": 8 * heads, "num_attention_heads": heads}
    theirs = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **known)
    assert trained(name, method="prefix", virtual_tokens=7) == peft_count(name, theirs)
    made = {"prefix_projection": True, "encoder_hidden_size": 9}
    theirs = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **known, **made)
    planned = trained(name, method="prefix", virtual_tokens=7, prefix_mlp=9)
    assert planned == peft_count(name, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "atention"},
        {"targets": ["q_proj", "input_layernorm", "re:("]},
        {"targets": "all", "layers": "7,0:1"},
        {"targets": "attention", "rank_pattern": {"up_proj": 2}},
    ],
    ids=lambda settings: str(settings["targets"]),
)
def test_what_matches_nothing_is_refused_as_the_real_model_refuses_it(settings):
    lora = LoRA(**settings)
    with pytest.raises(TargetError) as theirs:
        resolve(skeleton("llama"), lora)
    with pytest.raises(TargetError) as ours:
        planned("llama", lora)
    assert str(ours.value).replace("norm,", "LlamaRMSNorm,") == str(theirs.value)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "smollm2-135m": 134_515_008,
        "llama-7b": 6_738_415_616,
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
        "llama-2-70b": 68_976_648_192,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-3b": 3_085_938_688,
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-14b": 14_770_033_664,
        "qwen2.5-32b": 32_763_876_352,
        "qwen2.5-72b": 72_706_203_648,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "gpt-3": 174_604_259_328,
        "roberta-base": 124_697_433,
        "roberta-large": 355_412_057,
    }.items(),
)
def test_presets_have_the_parameters_of_the_published_models(name, parameters):
    assert shape_of(PRESETS[name]).parameters == parameters


def test_the_preset_minigpt_is_what_pretrain_builds():
    assert shape_of(PRESETS["minigpt"]) == shape_of(minigpt.MiniGPTConfig().to_dict())


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
    shape = shape_of(PRESETS[name])
    adapted = adapted_layers(shape, LoRA(rank=rank, targets=targets))
    assert trained_by(PlanConfig(), shape, adapted).count == parameters


@pytest.mark.parametrize(("method", "per_cent"), [("lora", 0.83), ("dora", 0.84)])
def test_the_table_of_dora_counts_adapters_with_all_parameters(method, per_cent):
    # Liu et al. 2024, table 1: LLaMA-7B, rank 32, on q, k, v, up and down.
    shape = shape_of(PRESETS["llama-7b"])
    adapted = adapted_layers(shape, LoRA(rank=32, targets="q_proj,k_proj,v_proj,up_proj,down_proj"))
    count = trained_by(PlanConfig(method=method), shape, adapted).count
    assert round(100 * count / (shape.parameters + count), 2) == per_cent


def test_one_square_projection_of_70b_is_the_described_262_144():
    shape = shape_of(PRESETS["llama-2-70b"])
    lora = LoRA(rank=16, targets="model.layers.0.self_attn.q_proj")
    (one,) = adapted_layers(shape, lora)
    count = trained_by(PlanConfig(), shape, (one,)).count
    assert count == 262_144
    assert round(100 * count / one.part.parameters, 2) == 0.39
