"""Bases as they are published: their blocks are the frozen weights, and stay in their files."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from support.closeness import assert_as_near, assert_gradients_no_further, assert_no_further
from support.published_bases import FORMATS, published
from support.random_adapters import ids, logits, shake, tokenizer
from veneer.cli.app import run
from veneer.formats.merged import write_model
from veneer.models.fingerprint import fingerprint, parameter_count
from veneer.models.load import load_base
from veneer.quant.awq import AWQ
from veneer.quant.compressed import CompressedInt
from veneer.quant.fp8 import FP8
from veneer.quant.gptq import GPTQ
from veneer.quant.stack import quantized_stacks
from veneer.quant.weight import quantized_layers

LINEAR = [name for name in FORMATS if name != "mxfp4"]
F32 = {"dtype": "float32"}


def gradients(model):
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    loss = model(ids(), use_cache=False).logits.logsumexp(-1).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("name", LINEAR)
def test_a_base_is_its_dense_twin(name, tmp_path):
    place, twin = published("qwen2", name)
    base = load_base(place, **F32)
    model, wide = base.model, load_twin(twin).double()
    layers = quantized_layers(model)
    assert {type(layer.quantized_weight) for layer in layers.values()} == {kind_of(name)}
    assert len(layers) == 14
    assert parameter_count(model) == parameter_count(twin)
    assert fingerprint(model) == fingerprint(load_base(place, bits=16, **F32).model)
    assert_no_further(logits(model), logits(twin), logits(wide), "logits")
    ours, theirs, exact = (
        gradients(shake(veneer.attach(each, veneer.LoRA(rank=2, targets="all"), seed=1)))
        for each in (model, load_twin(twin), wide)
    )
    assert_gradients_no_further(ours, theirs, exact)
    for path, layer in layers.items():
        own = path.removesuffix(".original")
        assert torch.equal(layer.weight, twin.get_submodule(own).weight)
    merged = veneer.merge(model)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    veneer.save(model, tmp_path / "a")
    again = veneer.load(load_base(place, **F32).model, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def load_twin(twin):
    again = type(twin)(twin.config).eval()
    again.load_state_dict(twin.state_dict())
    return again


def kind_of(name):
    return {"fp8": FP8, "fp8-channel": FP8, "gptq": GPTQ, "awq": AWQ}.get(name, CompressedInt)


def test_a_base_whose_layers_keep_their_weights_by_inputs():
    place, twin = published("gpt2", "gptq")
    model = load_base(place, **F32).model
    assert len(quantized_layers(model)) == 8
    assert_no_further(logits(model), logits(twin), logits(load_twin(twin).double()), "logits")


@pytest.mark.parametrize(
    ("architecture", "name"), [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"), ("qwen3_moe", "w4a16")]
)
def test_experts_are_those_of_the_dense_twin(architecture, name, tmp_path):
    place, twin = published(architecture, name)
    model, wide = load_base(place, **F32).model, load_twin(twin).double()
    wide.set_experts_implementation("eager")  # float64 has no grouped products
    stacks = quantized_stacks(model)
    assert len(stacks) == 4
    assert {stack.kind for stack in stacks.values()} == {FORMATS[name].kind}
    for path, stack in stacks.items():
        assert torch.equal(stack.dense(), twin.get_parameter(path))
    assert parameter_count(model) == parameter_count(twin)
    assert fingerprint(model) == fingerprint(load_base(place, bits=16, **F32).model)
    assert_no_further(logits(model), logits(twin), logits(wide), "logits")
    config = veneer.LoRA(rank=4, targets="all")
    ours, theirs, exact = (
        gradients(shake(veneer.attach(each, config, seed=1)))
        for each in (model, load_twin(twin), wide)
    )
    assert any("experts" in path for path in ours)
    assert_gradients_no_further(ours, theirs, exact)
    merged = veneer.merge(model)
    assert_as_near(logits(merged), logits(model), logits(wide))
    assert isinstance(merged.model.layers[0].mlp.experts.down_proj, torch.nn.Parameter)
    veneer.save(model, tmp_path / "a")
    again = veneer.load(load_base(place, **F32).model, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_weights_stay_in_their_files():
    place, _ = published("qwen2", "gptq")
    model = load_base(place, **F32).model
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("/proc is not here")
    lines = [line for line in maps.read_text().splitlines() if line.endswith(".safetensors")]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    for path, layer in quantized_layers(model).items():
        for name, tensor in layer.quantized_weight.tensors().items():
            at = tensor.data_ptr()
            assert any(first <= at < last for first, last in spans), f"{path}.{name}"


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_quantize_again_and_say_so(bits, tmp_path, capsys):
    place, twin = published("qwen2", "fp8")
    base = load_base(place, bits=bits, **F32)
    (notice,) = base.notices
    assert f"rounded to 8 bits (fp8) in its files, are rounded a second time, to {bits}" in notice
    assert notice.endswith("Without --bits they stay as they are there.")
    measured, path = re.search(
        r"takes ([\d.]+)% of the length of (\S+)\.weight\. An", notice
    ).groups()
    exact = twin.get_submodule(path).weight
    error = quantized_layers(base.model)[path].weight - exact
    assert float(measured) == pytest.approx(100 * float(error.norm() / exact.norm()), abs=0.06)
    write_model(twin, tokenizer(), tmp_path / "twin")
    expected = load_base(tmp_path / "twin", bits=bits, **F32).model
    assert torch.equal(logits(base.model), logits(expected))
    assert run(["quantize", str(place), str(tmp_path / "q"), "--bits", str(bits)]) == 0
    printed = capsys.readouterr().err
    assert f"takes {measured}% of the length" in printed
    assert "veneer tune takes the base as it is published, too." in printed
    assert "--bits" not in printed
    stored = quantized_layers(load_base(tmp_path / "q", **F32).model)
    assert stored.keys() == quantized_layers(expected).keys()
    for path, layer in quantized_layers(expected).items():
        assert torch.equal(stored[path].weight, layer.weight), path


def test_what_is_left_undone_is_announced():
    assert "inputs of layers in 8 bits" in load_base(published("qwen2", "fp8")[0]).notices[0]
    assert load_base(published("qwen2", "gptq")[0]).notices == ()


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"quant_method": "hqq"}, "quantized by hqq, but only bitsandbytes, MXFP4"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with bits 3, but only 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv, but only gemm"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
        (COMPRESSED, "say nothing of its weights"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": INT4 | {"num_bits": 3}}}},
            "num_bits 3, but only 4 or 8",
        ),
        (
            COMPRESSED
            | {
                "config_groups": {"g": {"weights": INT4}},
                "sparsity_config": {"format": "sparse-24"},
            },
            "sparsity sparse-24",
        ),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": INT4}}, "transform_config": {"a": 1}},
            "transforms of its activations",
        ),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": None, "input_activations": INT4}}},
            "activations alone",
        ),
        (
            COMPRESSED
            | {"config_groups": {"g": {"weights": INT4}}, "format": "nvfp4-pack-quantized"},
            "format nvfp4-pack-quantized",
        ),
    ],
)
def test_formats_that_cannot_be_read_are_refused_first(how, says, tmp_path):
    place, _ = published("qwen2", "gptq")
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = how
    (tmp_path / "config.json").write_text(json.dumps(settings))  # beside no weights at all
    with pytest.raises(veneer.ModelError, match=re.escape(says)):
        load_base(tmp_path)
    assert run(["plan", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", "up_proj.weight cannot be read as a quantized weight: .*qzeros"),
        ("shape", "up_proj.weight cannot be read as a quantized weight: scales are"),
        ("bits", "up_proj.weight cannot be read as a quantized weight: .* bits, not 4 or 8"),
        ("groups", "g_idx names other groups"),
        ("gone", "lacks 1 weights: model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_damaged_weights(damage, says, tmp_path):
    shutil.copytree(published("qwen2", "gptq")[0], tmp_path / "q")
    file, path = tmp_path / "q" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    if damage in ("missing", "gone"):
        keys = ["qzeros"] if damage == "missing" else ["qzeros", "qweight", "scales", "g_idx"]
        for key in keys:
            del tensors[f"{path}.{key}"]
    elif damage == "groups":
        tensors[f"{path}.g_idx"][3] = 9
    else:
        key = "scales" if damage == "shape" else "qweight"
        tensors[f"{path}.{key}"] = tensors[f"{path}.{key}"][:-1].clone()
    save_file(tensors, file)
    with pytest.raises(veneer.ModelError, match=says):
        load_base(tmp_path / "q")


def test_a_mixture_of_which_experts_alone_are_published_quantized_is_measured_there():
    (notice,) = load_base(published("gpt_oss", "mxfp4")[0], bits=8, **F32).notices
    assert "% of the length of model.layers.0.mlp.experts." in notice


def test_sixteen_bits_are_the_dense_numbers_of_the_published_ones():
    place, twin = published("qwen2", "fp8")
    dense, expected = load_base(place, **F32, bits=16).model, twin.state_dict()
    assert not quantized_layers(dense)
    assert all(torch.equal(weight, expected[name]) for name, weight in dense.state_dict().items())
