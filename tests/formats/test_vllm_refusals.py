"""vLLM refuses what `veneer check --for vllm` says that it refuses, for the reason that it gives,
and loads the rest with the flags that it names. It needs an environment of its own: make
proof-vllm."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import SHAPE, tiny, with_large_weights
from support.vllm import MARKS, Reader, Vllm
from support.vllm_sides import tiny_base, written
from veneer.formats.capture import capture
from veneer.formats.runtimes.check import check

pytestmark = MARKS
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def vllm(base) -> Iterator[Vllm]:
    started = Vllm(base, base.with_suffix(".log"), dtype="float32", max_model_len=64)
    yield started
    started.close()


@dataclass(frozen=True)
class Refused:
    """What vLLM refuses: how such an adapter is made, what check calls it, and vLLM's own words."""

    finding: str
    words: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[str, str] | None = None  # a part of each tensor's name


REFUSED = {
    "dora": Refused("use_dora", "does not yet support DoRA", options={"dora": True}),
    "a whole head": Refused(
        "modules_to_save", "only supports modules_to_save", config={"modules_to_save": ["lm_head"]}
    ),
    "biases": Refused("bias=all", "Adapter bias is not supported", config={"bias": "all"}),
    "lora_bias": Refused("lora_bias", r"LoRA bias \(lora_bias\)", config={"lora_bias": True}),
    "pissa by PEFT": Refused(
        "init_lora_weights=pissa",
        "does not support init_lora_weights='pissa'",
        config={"init_lora_weights": "pissa"},
    ),
    "aLoRA": Refused(
        "alora_invocation_tokens", "Activated LoRA", config={"alora_invocation_tokens": [3]}
    ),
    "replication": Refused(
        "layer_replication", "layer_replication", config={"layer_replication": [[0, 1]]}
    ),
    "blocks": Refused("use_bdlora", "BD-LoRA", config={"use_bdlora": {"nblocks": 2}}),
    "qalora": Refused("use_qalora", "QALoRA", config={"use_qalora": True}),
    "rank 600": Refused(
        "rank", "LoRA rank 600 is greater than max_lora_rank 16", options={"rank": 600}
    ),
    "new tokens": Refused(
        "key names",
        "unsupported LoRA weight",
        options={"targets": "embed_tokens"},
        renamed=("lora_embedding_A", "token_adapter.trainable_tokens_delta"),
    ),
    "another key": Refused(
        "key names", "unsupported LoRA weight", renamed=("lora_A.weight", "lora_A.default.weight")
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_check_says_is_refused_is_refused_for_that(name, vllm, base, tmp_path):
    case = REFUSED[name]
    model = veneer.load_base(base, dtype="float32").model
    place = written(model, tmp_path / "a", **{"targets": "qv", **case.options})
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | dict(case.config)))
    if case.renamed:
        tensors = load_file(place / WEIGHTS)
        save_file({key.replace(*case.renamed): t for key, t in tensors.items()}, place / WEIGHTS)
    refusals = {
        finding.what for finding in check(place, "vllm").findings if finding.verdict == "no"
    }
    assert case.finding in refusals
    refused = vllm.load(name, place)
    assert refused is not None
    assert re.search(case.words, refused), refused


def test_stacks_of_experts_load_with_the_flags_that_check_names(tmp_path):
    """And without them they are refused. On a processor nothing more can be seen: there adapters
    over a mixture end vLLM at its first answer."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "num_experts": 4}
    config = Qwen3MoeConfig(**SHAPE | heads, num_experts_per_tok=2, moe_intermediate_size=32)
    torch.manual_seed(0)
    model = with_large_weights(Qwen3MoeForCausalLM(config))
    veneer.write_model(model, tokenizer(), tmp_path / "base")
    stacks = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    place = written(model, tmp_path / "a", rank=4, targets=stacks)
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "experts")
    assert finding.verdict == "needs"
    assert "--enable-mixed-moe-lora-format" in finding.do
    assert '"is_3d_lora_weight": true' in finding.do
    vllm = Vllm(
        tmp_path / "base",
        tmp_path / "log",
        dtype="float32",
        max_model_len=64,
        enable_mixed_moe_lora_format=True,
    )
    refused = vllm.load("plain", place)
    assert refused is not None
    assert "contains fused 3D MoE weights" in refused
    assert "enable_mixed_moe_lora_format=True" in refused
    assert vllm.load("split", place, is_3d_lora_weight=True) is None
    with pytest.raises(RuntimeError, match=r"triton|Triton"):
        vllm.answer([("split", [3, 4, 5])], new=2)
    vllm.close()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method, vllm, base, tmp_path):
    model = veneer.load_base(base, dtype="float32").model
    veneer.attach(model, veneer.Method(method, virtual_tokens=4))
    veneer.save(model, tmp_path / "a", format="peft")
    assert not check(tmp_path / "a", "vllm").loads
    refused = vllm.load(method, tmp_path / "a")
    assert refused is not None
    assert "Missing required configuration fields" in refused


def test_a_head_of_classes_needs_a_base_that_is_served_as_a_classifier(vllm, base, tmp_path):
    model = veneer.load_base(base, dtype="float32").model
    place = written(model, tmp_path / "a", targets="qv")
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    head = {"base_model.model.score.weight": torch.ones(2, 64)}
    save_file(load_file(place / WEIGHTS) | head, place / WEIGHTS)
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "modules_to_save")
    assert finding.verdict == "needs"
    refused = vllm.load("score", place)
    assert refused is not None
    assert "does not expose a unique ClassificationHeadWithLoRA" in refused


def test_a_rank_above_the_limit_needs_the_flag_that_check_names(vllm, base, tmp_path):
    model = veneer.load_base(base, dtype="float32").model
    place = written(model, tmp_path / "a", rank=17, targets="qv")
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "rank")
    assert finding.do == "--max-lora-rank 32"
    refused = vllm.load("rank 17", place)
    assert refused is not None
    assert "LoRA rank 17 is greater than max_lora_rank 16" in refused


def test_a_limit_between_those_that_check_names_is_none(base):
    with pytest.raises(RuntimeError, match="max_lora_rank"):
        Vllm(base, base.with_suffix(".limit"), max_lora_rank=24, max_model_len=64)


@pytest.mark.parametrize(
    ("architecture", "its_class", "as_one"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", False),
        ("mixtral", "MixtralForCausalLM", False),
        ("gpt_oss", "GptOssForCausalLM", True),
    ],
)
def test_stacks_of_experts_are_read_as_they_werewritten(architecture, its_class, as_one, tmp_path):
    """By vLLM's own reader, expert by expert. Its kernels for them need Triton, which its build for
    processors does not bring, so that no answers can be compared here."""
    model = tiny(architecture)
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"rank": 6, "alpha": 9, "targets": ["q_proj", *stacks], "rslora": True}
    options |= {"expert_rank": 3, "alpha_pattern": {r".*\.1\..*down_proj": 4}}
    place = written(model, tmp_path / "a", keep=True, **options)
    state = capture(model)
    reader = Reader(tmp_path / "log")
    base = {"experts": 4, "architecture": its_class, "as_one": as_one}
    reader.do(experts=str(place), base=base, out=str(tmp_path / "deltas"))
    theirs = load_file(tmp_path / "deltas")
    reader.close()
    layers = [layer for layer in state.layers() if layer.kind == "parameter"]
    assert len(layers) == 4
    for layer in layers:
        owner, _, stack = layer.path.rpartition(".")
        scale = state.config.alpha_of(layer.path) / state.config.rank_of(layer.path) ** 0.5
        ours = scale * layer.B @ layer.A  # (experts, out, in)
        names = {"down_proj": ("down",), "gate_up_proj": ("gate_up",) if as_one else ("gate", "up")}
        read = torch.cat([theirs[f"{owner}.{name}"] for name in names[stack]], dim=1)
        torch.testing.assert_close(read, ours, rtol=1e-5, atol=1e-6 * float(ours.abs().max()))
