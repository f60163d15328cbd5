"""Adapters of experts in llama.cpp's files: it computes with them, and with merged models, what we
do, and we read them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from support.closeness import assert_same_logits
from support.llama_cpp import LlamaCpp
from support.random_adapters import distance, ids, logits, same, shake
from support.tiny_gguf import MIXTURES, VOCAB, random_model, write_model
from veneer.errors import AdapterError, ModelError
from veneer.formats.capture import capture
from veneer.formats.gguf import adapter as store
from veneer.formats.gguf import mapping
from veneer.formats.gguf.model import write_merged
from veneer.formats.install import install

# qwen2_moe has a shared expert beside the routed ones, with a gate of its own.
FAST = "qwen2_moe"
EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in MIXTURES]
READ = {"qwen2_moe", "qwen3_moe"}  # whose files transformers reads
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 3, "expert_rank": 3, "targets": ["all", *STACKS, "router"]},
    "ranks and scales": {
        "rank": 4,
        "alpha": 6,
        "rslora": True,
        "targets": ["attention", *STACKS],
        "rank_pattern": {"down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 3},
        "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 3},
    },
    "one A": {"rank": 3, "expert_rank": 2, "targets": STACKS, "shared_expert_a": True},
}
HALF = 2 * torch.finfo(torch.float16).eps  # of the norm of log probabilities


def adapted(base: PreTrainedModel, case: str) -> PreTrainedModel:
    router = "mlp.router.weight" if base.config.model_type == "gpt_oss" else "mlp.gate.weight"
    options = ADAPTERS[case]
    targets = [router if target == "router" else target for target in options["targets"]]
    config = veneer.LoRA(**options | {"targets": targets})
    model = veneer.attach(copy.deepcopy(base), config, seed=0)
    return shake(model, size=0.2)


def last(model: PreTrainedModel) -> Tensor:
    return logits(model, ids(2, 9))[:, -1].log_softmax(-1)


@pytest.mark.parametrize("name", EACH)
def test_llama_cpp_computes_what_we_do(name, tmp_path):
    base = random_model(name)
    place = write_model(name, base, tmp_path / "base.gguf")
    files, expected = {}, {}
    for case in ADAPTERS:
        model = adapted(base, case)
        files[case] = tmp_path / f"{case}.gguf"
        store.write(capture(model), files[case], base.config)
        veneer.use(model, {"default": 0.5})
        half = last(model)
        veneer.use(model, "default")
        expected[case] = last(model), half
    server = LlamaCpp(place, list(files.values()), exact=True)
    plain, tokens = last(base), ids(2, 9)
    off = distance(server.next_token(tokens, VOCAB), plain)
    assert off < HALF
    for case, values in expected.items():
        for scale, ours in zip((1.0, 0.5), values, strict=True):
            theirs = server.next_token(tokens, VOCAB, {files[case]: scale})
            assert distance(theirs, ours) < HALF + 2 * off, (case, scale)
            assert distance(ours, plain) > 0.03, (case, scale)


@pytest.mark.parametrize("name", EACH)
def test_what_is_written_reads_back(name, tmp_path):
    base = random_model(name)
    for case in ADAPTERS:
        model = adapted(base, case)
        file = tmp_path / "adapter.gguf"
        notes = store.write(capture(model), file, base.config)
        again = store.read(file, base.config)
        fresh = copy.deepcopy(base)
        install(fresh, again)
        assert_same_logits(logits(fresh), model, logits)
        if case == "all":
            assert not notes
            assert same(again.tensors, capture(model).tensors)


@pytest.mark.parametrize("name", [p for p in EACH if p.values[0] in READ])
def test_a_merged_model_answers_as_here(name, tmp_path):
    base = random_model(name)
    place = write_model(name, base, tmp_path / "base.gguf")
    model = adapted(base, "all")
    write_merged(place, capture(model), tmp_path / "merged.gguf", force=True)
    server = LlamaCpp(tmp_path / "merged.gguf", exact=True)
    theirs = server.next_token(ids(2, 9), VOCAB)
    assert distance(theirs, last(model)) < 2 * HALF
    assert distance(theirs, last(base)) > 0.03


def test_a_mixture_whose_file_is_not_read_whole_is_refused(tmp_path):
    base = random_model("gpt_oss")
    place = write_model("gpt_oss", base, tmp_path / "base.gguf")
    with pytest.raises(ModelError, match=r"is a gpt-oss model .* let llama.cpp apply the adapter"):
        write_merged(place, capture(adapted(base, "one A")), tmp_path / "merged.gguf")


def naming() -> Any:
    return store.naming_of(MIXTURES[FAST][1])


def written(case: str = "all") -> mapping.Contents:
    return mapping.contents_of(capture(adapted(random_model(FAST), case)), naming())


def test_gate_and_up_of_two_adapters_become_one():
    """Another program's file may have an A for each, or one of the two alone."""
    made = written()
    gate, up = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
    A, B = made.tensors[f"{up}.lora_a"], made.tensors[f"{up}.lora_b"]
    made.tensors[f"{up}.lora_a"], made.tensors[f"{up}.lora_b"] = 2 * A[:, :2], B[..., :2]
    for alpha in (made.alpha, 0.0):
        contents = mapping.Contents(made.architecture, alpha, dict(made.tensors))
        state = mapping.state_of(contents, naming())
        layer = next(x for x in state.layers() if x.path.endswith("0.mlp.experts.gate_up_proj"))
        assert layer.A.shape[1] == 3 + 2
        ours = state.config.scaling_of(layer.path) * (layer.B @ layer.A)
        for rows, name in zip(ours.chunk(2, dim=1), (gate, up), strict=True):
            a, b = (torch.from_numpy(contents.tensors[f"{name}.lora_{x}"]) for x in "ab")
            scaling = alpha / a.shape[1] if alpha else 1.0
            assert distance(rows, scaling * (b @ a)) < 1e-6
    for half in ("a", "b"):
        del made.tensors[f"{gate}.lora_{half}"]
    state = mapping.state_of(made, naming())
    layer = next(x for x in state.layers() if x.path.endswith("0.mlp.experts.gate_up_proj"))
    assert not layer.B.chunk(2, dim=1)[0].any()


def test_gate_and_up_that_a_stack_has_row_by_row_in_turn():
    base = random_model("gpt_oss")
    state, names = capture(adapted(base, "one A")), store.naming_of(base.config)
    made = mapping.contents_of(state, names)
    for layers in (state.layers(), mapping.state_of(made, names).layers()):
        B = next(x.B for x in layers if x.path.endswith("0.mlp.experts.gate_up_proj"))
        for first, name in enumerate(("gate", "up")):
            rows = torch.from_numpy(made.tensors[f"blk.0.ffn_{name}_exps.weight.lora_b"])
            assert torch.equal(rows, B[:, first::2])


def test_tensors_that_do_not_go_together_are_refused():
    made = written()
    name = "blk.1.ffn_up_exps.weight"
    for end, wrong, why in (
        ("a", lambda t: t[:3], "tensors of model.layers.1.mlp.experts.gate_up_proj do not go"),
        ("b", lambda t: t[0], "is no stack of matrices"),
    ):
        key = f"{name}.lora_{end}"
        contents = mapping.Contents(
            made.architecture, 6.0, made.tensors | {key: wrong(made.tensors[key])}
        )
        with pytest.raises(AdapterError, match=why):
            mapping.state_of(contents, naming())
