"""`veneer plan`: what it prints, what it refuses, and that help imports no torch."""

import json
import re

import pytest

import veneer.cli.plan_tables
import veneer.plan.find
from support.thinned import thinned
from support.tiny_gguf import random_model, write_model
from veneer.adapter.config import LoRA
from veneer.cli.app import run
from veneer.errors import ModelError
from veneer.models.load import config_of
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes, sizes_of
from veneer.plan.methods import adapted_layers
from veneer.plan.near_presets import near_presets
from veneer.plan.plan import comparison, make_plan
from veneer.plan.presets import PRESETS

LLAMA = PRESETS["smollm2-135m"]


def printed(capsys, *arguments, free=24 * 10**9, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(veneer.cli.plan_tables, "free_bytes", lambda: free)
    assert run(["plan", *arguments]) == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_plan_shows_layers_methods_memory_and_what_fits(capsys, monkeypatch):
    text = printed(capsys, "llama-2-70b", "--rank", "16", monkeypatch=monkeypatch)
    assert "lora: 65,536,000 of 68,976,648,192 parameters train (0.095%)" in text
    assert "self_attn.k_proj 80 1,024 × 8,192 8,388,608 671,088,640 11,796,480 1.76%" in text
    assert "83,886,080 parameters instead of 65,536,000" in text
    for method in ("full, textbook", "full", "freeze, last 2", "lora", "dora", "qlora", "prompt"):
        assert f" {method} " in text
    assert "138.0 GB 138.0 GB 551.8 GB" in text
    assert "24.0 GB are free here: it does not fit." in text
    assert "With --recompute" in text
    assert "on the disk that veneer quantize wrote" in text


def test_a_plan_that_fits_says_so_and_one_that_never_does_too(capsys, monkeypatch):
    for free, message in (
        (10**12, "1000.0 GB are free here: it fits."),
        (13 * 10**8, "it just fits, with less than 10% left. --recompute selective needs"),
        (10**6, "it does not fit, whatever its settings."),
        (None, "this system does not say"),
    ):
        text = printed(capsys, "gpt2", free=free, monkeypatch=monkeypatch)
        assert message in text


@pytest.mark.parametrize(
    ("memory", "shown", "fits"),
    [
        ("24GB", "24.0 GB", "it just fits, with less than 10% left. --recompute selective needs"),
        pytest.param(
            *("22GB", "22.0 GB", "it does not fit. With --recompute selective it would"),
            marks=pytest.mark.slow,
        ),
        pytest.param("36 GiB", "38.7 GB", "it fits.", marks=pytest.mark.slow),
        ("0.08t", "80.0 GB", "it fits."),
        ("600MB", "600.0 MB", "it does not fit, whatever its settings."),
    ],
)
def test_memory_of_another_machine_replaces_what_is_free_here(
    capsys, monkeypatch, memory, shown, fits
):
    arguments = ("qwen3-8b", "--memory", memory)
    text = printed(capsys, *arguments, free=10**6, monkeypatch=monkeypatch)
    assert f"{shown} are what --memory says, not what is free here: {fits}" in text
    assert bool(re.search(" (yes|just) ", text)) == ("whatever" not in fits)


@pytest.mark.parametrize(
    ("name", "near"),
    {
        "qwen3-7b": ["qwen3-8b", "qwen3-4b"],
        "Qwen/Qwen3-8B": ["qwen3-8b"],
        "qwen3-30b": ["qwen3-30b-a3b"],
        "llama3.2-2b": ["llama-3.2-3b", "llama-3.2-1b"],
        "gemma3-300m": ["gemma-3-270m", "gemma-3-1b"],
        "lama-2-70b": ["llama-2-70b"],
        "deepseek-v2": ["deepseek-v3"],
        "zzzzz": [],
        "9" * 10**5 + "b": [],
    }.items(),
)
def test_an_unknown_name_brings_the_presets_of_its_family(name, near):
    assert near_presets(name) == near


def test_a_size_of_nothing_is_no_size():
    (near,) = near_presets("qwen3-0b")
    assert near.startswith("qwen3")


def test_hub_names_are_planned_as_tune_loads_them(capsys, monkeypatch):
    asked = []

    def load_config(name):
        asked.append(name)
        if name == "some/model":
            return config_of(LLAMA)
        raise ModelError(f"{name} cannot be read.")

    monkeypatch.setattr(veneer.plan.find, "load_config", load_config)
    for command in ("plan", "inspect"):
        assert run([command, "some/model"]) == 0
        assert "of 134,515,008 parameters train" in re.sub(r"\s+", " ", capsys.readouterr().out)
        assert run([command, "Qwen/Qwen3-8B"]) == 2
        error = capsys.readouterr().err
        assert "cannot be read. Presets need no hub; did you mean 'qwen3-8b'?" in error
    assert asked == ["some/model", "Qwen/Qwen3-8B"] * 2


def test_formulas_are_shown_when_asked_for(capsys):
    formula = "30 layers × 2,048 tokens × 3,072 numbers × 2 bytes (gate and up)"
    assert formula in printed(capsys, "smollm2-135m", "--formulas")
    assert formula not in printed(capsys, "smollm2-135m")
    less = printed(capsys, "smollm2-135m", "--formulas", "--tokens", "256")
    assert formula.replace("2,048", "256") in less


# The widest numbers are GPT-3's, and the longest names of layers those of the others.
@pytest.mark.parametrize(
    "arguments",
    [
        *(f"gpt-3 --method {m}" for m in ("full", "freeze", "dora", "qlora", "prefix", "prompt")),
        "gpt-3 --bits 8",
        "gpt-3 --bits 4 --mapped",
        "gpt-3 --targets all --layers 0:2",
        *("llama-2-70b", "gpt2", "qwen2.5-72b"),
    ],
)
@pytest.mark.thinned(one_in=4)
def test_every_plan_keeps_to_100_columns(capsys, arguments):
    assert run(["plan", *arguments.split(), "--formulas"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "deepseek-v3",
            [
                "128 heads over a latent of 512, feed-forward 18,432 in 3 blocks, 256 experts of "
                "2,048 (8 active) and 2,048 shared in 58 blocks",
                "Left out: prefix needs a model that keeps keys and values of one shape",
                "37,552,282,624 parameters compute a token (5.6%).",
                "a pass of 2,048 would reach 256.0 of 256 experts in a block",
                "post_attention_ 61 7,168 437,248 layernorm",
            ],
        ),
        ("llama-4-scout", ["feed-forward 16 experts of 8,192 (1 active) and 8,192 shared,"]),
        ("qwen3-30b-a3b", ["feed-forward 128 experts of 768 (8 active),", "batch 1024 it would"]),
        ("gpt-oss-20b", ["feed-forward 32 experts of 2,880 (4 active),"]),
    ],
)
@pytest.mark.thinned(one_in=4)
def test_a_mixture_is_described_by_its_experts_and_by_what_bits_leave(capsys, name, texts):
    text = printed(capsys, name, "--method", "qlora", "--memory", "20GB")
    for expected in texts:
        assert expected in text


def test_a_directory_or_a_config_is_planned_as_well_as_a_preset(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_sizes(name) == find_sizes("smollm2-135m")
        assert "134,515,008" in printed(capsys, str(name))


def test_every_flag_is_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    assert run(["plan", "--help"]) == 0
    rows = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if "--" in line]
    flags = ("method", "bits", "tokens", "tokens-per-batch", "recompute", "mapped", "formulas")
    for flag in flags:
        (row,) = [row for row in rows if re.match(rf"--{flag}\s", row)]
        assert len(row.split()) > 3


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["lama-2-70b"], ["no such preset", "did you mean 'llama-2-70b'", "gpt-3"]),
        (["some.gguf"], ["no such directory or file", "gpt-3"]),
        (["gpt2", "--targets", "q_proj"], ["'q_proj' matches no layer"]),
        (["gpt2", "--method", "full", "--bits", "4"], ["full trains weights"]),
        (["gpt2", "--method", "lor"], ["lor"]),
        (["gpt2", "--tokens", "0"], ["tokens_per_batch is 0"]),
        (["qwen3-7b"], ["did you mean 'qwen3-8b' or 'qwen3-4b'?"]),
        *((["gpt2", "--memory", size], ["such as 24GB or 80GiB"]) for size in ("24", "0GB", "x")),
    ],
)
def test_what_cannot_be_planned_ends_with_2_and_says_why(capsys, arguments, messages):
    assert run(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for message in messages:
        assert message in error


def test_an_unknown_model_type_names_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        config_of({"model_type": "lama"})


def test_a_model_that_is_no_causal_language_model_is_refused():
    with pytest.raises(ModelError, match="vit is no causal language model"):
        sizes_of(config_of({"model_type": "vit"}))


def test_an_error_lists_all_that_cannot_be_in_a_config_by_its_own_names():
    with pytest.raises(ModelError) as error:
        config_of({"model_type": "gpt2", "n_embd": "wide", "n_layer": 0, "vocab_size": 10})
    for message in ("n_embd is 'wide'", "n_layer is 0"):
        assert message in str(error.value)


def test_what_a_config_leaves_out_is_what_transformers_builds():
    assert sizes_of(config_of({"model_type": "gpt2"})) == find_sizes("gpt2")


def test_a_gguf_file_is_planned_and_a_directory_that_holds_only_it(capsys, tmp_path):
    model = random_model("llama")
    file = write_model("llama", model, tmp_path / "model.gguf")
    for place in (file, tmp_path):
        assert f"{model.num_parameters():,} parameters" in printed(capsys, str(place))


@pytest.mark.parametrize("name", ["qwen3-8b", "gpt-oss-20b"])
def test_presets_and_configs_are_inspected(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]), encoding="utf-8")
    for model in (name, tmp_path / "config.json"):
        assert run(["inspect", str(model)]) == 0
        parameters = find_sizes(name).description.parameters
        assert f"of {parameters:,} parameters train" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", b"\xff\xfe"])
def test_a_damaged_config_is_one_clear_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=r"config\.json"):
        find_sizes(path)
    with pytest.raises(ModelError, match="neither a config"):
        find_sizes(tmp_path.parent)


@pytest.mark.parametrize(
    ("how", "bits"), [("load_in_4bit", "NF4"), ("load_in_8bit", "8-bit codes")]
)
@pytest.mark.thinned(one_in=2)
def test_a_quantized_directory_is_planned_as_it_is(how, bits, tmp_path, capsys):
    quantization = {"quant_method": "bitsandbytes", how: True}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    text = printed(capsys, str(tmp_path), "--formulas")
    assert "Memory of qlora" in text
    assert "on disk, mapped" in text
    assert bits in text
    # What is asked for goes before what stands there.
    assert "Memory of full" in printed(capsys, str(tmp_path), "--method", "full")


def test_two_names_of_one_flag_are_not_given_together(capsys):
    flags = ["--tokens", "64", "--tokens-per-batch", "128"]
    assert run(["plan", "gpt2", *flags]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_plans_own_row_is_the_plan():
    sizes = find_sizes("smollm2-135m")
    adapted = adapted_layers(sizes, LoRA())
    for settings in ({"bits": 8}, {"method": "qlora", "bits": 8, "mapped": True}, {}):
        plan = make_plan(PlanConfig(**settings), sizes, adapted)
        rows = dict(comparison(plan))
        assert rows[plan.config.method] is plan
        assert len(rows) == 8


PUBLISHED = {
    "gptq": ({"bits": 4, "group_size": 128}, 4 + 20 / 128),
    "awq": ({"bits": 4, "group_size": 64}, 4 + 20 / 64),
    "fp8": ({"weight_block_size": [128, 128]}, 8 + 32 / 128**2),
    "mxfp4": ({}, 4.25),
    "compressed-tensors": (
        {
            "format": "pack-quantized",
            "config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 32}}},
            "ignore": ["lm_head"],
        },
        4.5,
    ),
}


@pytest.mark.parametrize(
    "method",
    thinned([*PUBLISHED], ("gptq", "mxfp4").__contains__),  # a dense one and a mixture
)
def test_what_is_published_quantized_is_planned_by_what_its_files_hold(method, tmp_path, capsys):
    how, bits = PUBLISHED[method]
    name = "gpt-oss-20b" if method == "mxfp4" else "llama-2-7b"
    config = PRESETS[name] | {"quantization_config": {"quant_method": method, **how}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = printed(capsys, str(tmp_path), "--formulas")
    assert f"{method}: {bits:.3f} bits" in text
    description = find_sizes(name).description
    layers = [x for x in description.quantizable if method != "mxfp4" or x.is_stack]
    numbers = sum(layer.out * layer.in_ for layer in layers)
    size = numbers * bits / 8 + 2 * (description.parameters - numbers)
    assert f"on disk, mapped {size / 1e9:.1f} GB" in text
    assert run(["inspect", str(tmp_path)]) == 0
    assert f"quantized, in {bits:.2f} bits a number" in capsys.readouterr().out
    # Asked for, the base is quantized again.
    assert "NF4: 4.127 bits" in printed(capsys, str(tmp_path), "--formulas", "--bits", "4")


@pytest.mark.parametrize("quantization", [{"quant_method": "hqq", "bits": 4}, "int4"])
def test_what_cannot_be_read_is_not_planned(quantization, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    assert run(["plan", str(tmp_path)]) == 2
    assert "Take the model before it was quantized" in capsys.readouterr().err


def test_a_quantized_head_is_seen(tmp_path, capsys):
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "llm_int8_skip_modules": [],
    }
    config = PRESETS["llama-2-7b"] | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = printed(capsys, str(tmp_path), "--formulas")
    assert "(embeddings, norms, biases)" in text
