"""GGUF files: dense weights as the file says, and token ids as llama.cpp's."""

import json
import re
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from mixed_text import SPECIAL, mixed_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from support.llama_cpp import LlamaCpp
from support.tiny_gguf import random_model, write_model
from veneer.errors import ModelError
from veneer.formats.training import computed_in
from veneer.models import gguf
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base, load_skeleton
from veneer.models.locate import locate
from veneer.quant.stack import quantized_stacks
from veneer.quant.weight import quantized_layers

Post = Callable[[str, dict], dict]


@pytest.fixture(scope="module", autouse=True)
def _parsed_once():
    """Parse the file once for all tests: that takes most of a reader's time."""
    with gguf.read_once():
        yield


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return locate("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return gguf.load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def model(smollm2) -> PreTrainedModel:
    return gguf.load_model(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama_cpp(smollm2) -> Post:
    """llama.cpp's own server over the same file."""
    return LlamaCpp(smollm2, context=1024).ask


def llama_ids(post: Post, text: str) -> list[int]:
    # No token of its own around the text, but special tokens that stand in it are such, which is
    # what a tokenizer of transformers does without add_special_tokens.
    body = {"content": text, "add_special": False, "parse_special": True}
    return post("/tokenize", body)["tokens"]


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_ids_equal_those_of_llama_cpp_line_by_line(count, tokenizer, llama_cpp):
    lines = mixed_lines(count)
    assert len(set(lines)) > 0.96 * count
    assert sum(any(token in line for token in SPECIAL) for line in lines) > count / 10
    ours = tokenizer(lines, add_special_tokens=False)["input_ids"]
    differing = [
        (line, ids, theirs)
        for line, ids in zip(lines, ours, strict=True)
        if ids != (theirs := llama_ids(llama_cpp, line))
    ]
    assert differing[:3] == []


def test_the_lines_tell_a_wrong_tokenizer_from_a_right_one(smollm2, tokenizer):
    lines = mixed_lines(300)
    without = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    ours, theirs = (t(lines, add_special_tokens=False)["input_ids"] for t in (tokenizer, without))
    assert sum(map(list.__ne__, ours, theirs)) > 50


def test_chat_prompts_are_tokenised_as_by_llama_cpp(tokenizer, llama_cpp):
    messages = [{"role": "user", "content": "What is 12 × 345?\n\n   Show  your\twork."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(ids) == llama_ids(llama_cpp, text)


def test_every_line_comes_back_from_its_ids(tokenizer):
    for line in mixed_lines(300, seed=1):
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == line


@pytest.mark.slow  # as it is of small models in tests/formats/test_gguf_plain.py
def test_the_next_token_is_as_likely_as_llama_cpp_says(model, tokenizer, llama_cpp):
    # llama.cpp rounds what flows between its layers to 8 bits, so its numbers are near ours only.
    for prompt in ("The capital of France is", "Water boils at", "def add(a, b):\n    return"):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        ours = logits.log_softmax(0)
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5}
        (reply,) = llama_cpp("/completion", body)["completion_probabilities"]
        assert ours.argmax() == reply["id"]
        for theirs in reply["top_logprobs"]:
            assert float(ours[theirs["id"]]) == pytest.approx(theirs["logprob"], abs=0.6)


def original(tensor: gguf_format.ReaderTensor, model: PreTrainedModel) -> np.ndarray:
    """Return a tensor of the file as the model keeps it: q and k in halves, not in pairs."""
    weight = gguf_format.quants.dequantize(tensor.data, tensor.tensor_type)
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }.get(tensor.name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    # llama.cpp rotates neighbouring rows of a head, transformers those half a head apart.
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


@pytest.mark.slow  # as those of the small models below are
def test_weights_are_the_file_s_own_dequantised(smollm2, model):
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    parameters = dict(model.named_parameters())
    tensors = gguf_format.GGUFReader(smollm2).tensors
    assert len(tensors) == len(parameters)
    for tensor in tensors:
        *block, name, _ = tensor.name.split(".")
        path = (f"model.layers.{block[1]}." if block else "") + names[name] + ".weight"
        expected = torch.from_numpy(np.array(original(tensor, model)))
        assert torch.equal(parameters[path], expected), tensor.name


@pytest.mark.slow
def test_the_model_is_dense_and_can_be_saved(model, tmp_path):
    assert all(type(weight) is torch.nn.Parameter for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert getattr(model, "hf_quantizer", None) is None or not model.is_quantized
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    saved = dict(again.named_parameters())
    assert all(torch.equal(saved[n], w) for n, w in model.named_parameters())


@pytest.mark.slow
def test_the_skeleton_has_the_same_shapes(model):
    skeleton = load_skeleton("smollm2-135m")
    assert skeleton.config.model_type == model.config.model_type == "llama"
    shapes = {path: weight.shape for path, weight in model.named_parameters()}
    assert {path: weight.shape for path, weight in skeleton.named_parameters()} == shapes
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("load", "damage"),
    [
        *product(
            (gguf.load_model, gguf.load_tokenizer, gguf.load_config),
            ("empty", "garbage", "header"),
        ),
        (gguf.load_model, "half"),  # its first half holds all that the others read
    ],
)
def test_a_damaged_file_is_a_model_error_that_names_it(smollm2, tmp_path, load, damage):
    path = tmp_path / "damaged.gguf"
    size = {"empty": 0, "header": 2000, "half": smollm2.stat().st_size // 2}.get(damage, 0)
    with smollm2.open("rb") as file:
        path.write_bytes(bytes(range(256)) * 40 if damage == "garbage" else file.read(size))
    with pytest.raises(ModelError, match=r"damaged\.gguf"):
        load(path)


def test_what_transformers_needs_is_a_dependency_and_missing_it_is_not_blamed_on_the_file(
    smollm2, monkeypatch
):
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    needed = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert any(one.startswith("accelerate") for one in needed)
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: False)
    with pytest.raises(ModelError, match=r"pip install accelerate`\.$"):
        gguf.load_model(smollm2)


# llama orders rows in pairs; gpt2 keeps weights (in, out); mixtures have gate and up apart.
def rounded_by(model: PreTrainedModel, dense: PreTrainedModel, path: str) -> float:
    """Return ‖W − Ŵ‖ / ‖W‖ of a quantized layer, or of the first expert of a stack."""
    weight = dense.get_parameter(path)
    if path in (stacks := quantized_stacks(model)):
        own, weight = stacks[path].dense()[0], weight[0]
    else:
        layer = quantized_layers(model)[path.removesuffix(".weight")]
        own = layer.weight.T if layer.transposed else layer.weight
    return float((own - weight.detach()).norm() / weight.detach().norm())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
@pytest.mark.thinned
def test_linear_layers_stay_in_the_file_s_blocks_with_the_dense_model_s_numbers(
    name, kind, tmp_path
):
    file = write_model(name, random_model(name), tmp_path / "model.gguf", kind=kind)
    kept = load_base(file, dtype="float32", tokenizer=object())
    dense = load_base(file, dtype="float32", bits=16, tokenizer=object())
    (notice,) = kept.notices
    assert f"stay in model.gguf, in its own blocks ({kind})" in notice
    assert dense.notices == ()
    layers, weights = quantized_layers(kept.model), dense.model.state_dict()
    own_linear = [m for m in kept.model.modules() if isinstance(m, torch.nn.Linear)]
    assert kept.model.get_output_embeddings() in own_linear
    assert len(own_linear) <= 1 + 2 * name.endswith("moe")  # gates of shared experts are in float32
    stacks = quantized_stacks(kept.model)
    assert len(stacks) == 4 * name.endswith("moe")
    for path, stack in stacks.items():
        assert torch.equal(stack.dense(), weights.pop(path))
    for path, layer in layers.items():
        own = layer.weight.T if layer.transposed else layer.weight
        assert torch.equal(own, weights.pop(f"{path}.weight"))
    assert len(layers) >= 8
    others = kept.model.state_dict()
    assert all(torch.equal(others[path], weight) for path, weight in weights.items())
    assert fingerprint(kept.model) == fingerprint(dense.model)
    assert computed_in(kept.model) == computed_in(dense.model)
    again = load_base(file, bits=4, tokenizer=object())
    notice = again.notices[-1]
    assert f"rounded to {kind} in its files, are rounded a second time, to 4 bits" in notice
    measured, path = re.search(r"takes ([\d.]+)% of the length of (\S+)\. An", notice).groups()
    assert float(measured) == pytest.approx(
        100 * rounded_by(again.model, dense.model, path), abs=0.06
    )
    assert fingerprint(again.model) == fingerprint(dense.model)
