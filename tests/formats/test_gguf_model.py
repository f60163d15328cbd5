"""Merged models as the GGUF files that their bases came from."""

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import veneer
from support.closeness import assert_same_logits
from support.llama_cpp import LlamaCpp
from support.random_adapters import NEW_TOKENS, distance, ids, logits, shake
from support.tiny_gguf import CONFIGS, VOCAB, random_model, tensors_of, write_model
from veneer.cli.app import run
from veneer.errors import AdapterError, ModelError
from veneer.formats.capture import capture
from veneer.formats.gguf.model import MergedTensor, kept_of, kind_for, write_merged
from veneer.formats.state import NewTokenRows
from veneer.models import gguf as reading

# transformers reads no GGUF of SmolLM 3, Gemma 1 and Phi 2, none of Phi 3 with so small a
# vocabulary, and Mistral's as Llama's.
READ = [name for name in CONFIGS if name not in ("smollm3", "gemma", "phi", "phi3", "mistral")]
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
Kind = gguf.GGMLQuantizationType
HALF = 2 * torch.finfo(torch.float16).eps  # llama.cpp has tables of half precision


def loaded(file: Path) -> PreTrainedModel:
    return reading.load_model(file, dtype=torch.float32).eval()


def adapted(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return shake(veneer.attach(model, veneer.LoRA(**options)), size=0.2)


def raw(file: Path) -> dict[str, tuple[str, bytes]]:
    """Return each tensor's kind and bytes."""
    reader = gguf.GGUFReader(file)
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


def metadata(file: Path) -> bytes:
    reader = gguf.GGUFReader(file)
    return bytes(reader.data[24 : reader.tensors[0].field.offset])


OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 3, "targets": "attention"},
    "patterns": {
        "rank": 4,
        "targets": "all",
        "rslora": True,
        "rank_pattern": {r".*\.1\..*": 2},
        "alpha_pattern": {"(v|o|c|qkv)_proj": 3},
    },
    "dora": {"rank": 3, "targets": "all", "dora": True},
    "start": {"rank": 2, "targets": "all", "init": "olora"},
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *product(("llama", "gpt2"), OPTIONS),
        *product(sorted({*READ} - {"llama", "gpt2"}), ("patterns",)),
    ],
)
@pytest.mark.thinned(one_in=3)
def test_the_merged_file_is_the_merged_model(name, case, tmp_path):
    base = write_model(name, random_model(name), tmp_path / "base.gguf")
    model = adapted(loaded(base), **OPTIONS[case])
    report = write_merged(base, capture(model), tmp_path / "merged.gguf")
    assert {tensor.kind for tensor in report} == {"F32"}
    assert max(tensor.error for tensor in report) == 0
    merged = loaded(tmp_path / "merged.gguf")
    assert_same_logits(logits(merged), model, logits)
    assert distance(logits(model), logits(loaded(base))) > 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thinned(one_in=2)
def test_what_no_adapter_touches_stays_bit_for_bit(kind, tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf", kind=kind)
    model = adapted(loaded(base), rank=4, targets=["q_proj", "down_proj"], layers="1")
    report = write_merged(base, capture(model), tmp_path / "merged.gguf")
    assert metadata(tmp_path / "merged.gguf") == metadata(base)
    before, after = raw(base), raw(tmp_path / "merged.gguf")
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"blk.1.attn_q.weight", "blk.1.ffn_down.weight"}
    assert {tensor.name for tensor in report} == changed
    assert {kinds for _, (kinds, _) in sorted(after.items())} <= {"F32", kind}
    # The error that is reported is the one that is there, and no larger than the kind's own.
    plain = veneer.merge(model)
    expected = tensors_of("llama", plain)
    for tensor in report:
        bits, data = after[tensor.name]
        assert (tensor.was, tensor.kind, bits) == (kind, kind, kind)
        there = gguf.dequantize(
            np.frombuffer(data, np.uint8).reshape(len(expected[tensor.name]), -1), Kind[kind]
        )
        error = np.linalg.norm(there - expected[tensor.name]) / np.linalg.norm(
            expected[tensor.name]
        )
        assert tensor.error == pytest.approx(float(error), rel=1e-3, abs=1e-6)
        assert tensor.error < {"F32": 1e-7, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01}.get(kind, 0.12)


def test_changed_tensors_take_another_kind_on_request(tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf", kind="Q4_0")
    state = capture(adapted(loaded(base), rank=4, targets=["v_proj"]))
    errors = []
    for kind in ("q4_0", "q8_0", "F16"):
        report = write_merged(base, state, tmp_path / f"{kind}.gguf", kind=kind)
        after = raw(tmp_path / f"{kind}.gguf")
        assert {after[tensor.name][0] for tensor in report} == {kind.upper()}
        assert after["blk.0.attn_q.weight"] == raw(base)["blk.0.attn_q.weight"]
        errors.append(max(tensor.error for tensor in report))
        loaded(tmp_path / f"{kind}.gguf")
    assert errors[0] > 8 * errors[1] > 80 * errors[2]
    with pytest.raises(ModelError, match=r"cannot write 'q4_k'; it can write q4_0"):
        write_merged(base, state, tmp_path / "no.gguf", kind="q4_k")


def test_a_change_that_rounding_would_undo_is_refused_and_may_be_insisted_on(tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf", kind="Q4_1")
    model = veneer.attach(loaded(base), veneer.LoRA(rank=4, targets="all"))
    state, out = capture(shake(model, size=0.02)), tmp_path / "merged.gguf"
    with pytest.raises(AdapterError, match=r"Rounded to Q4_1, \d+% of the adapter's change.*q8_0"):
        write_merged(base, state, out)
    assert not out.exists()
    assert kept_of(write_merged(base, state, out, kind="q4_1")) < 0.5
    assert kept_of(write_merged(base, state, out, kind="q8_0")) > 0.9
    assert kept_of(write_merged(base, state, out, kind="f16")) == pytest.approx(1, abs=1e-3)
    # By hand, for one tensor: what is stored lies so far from the base along the change.
    report = write_merged(base, state, out, kind="q4_1")
    one = next(tensor for tensor in report if tensor.name == "blk.0.attn_v.weight")
    path = "model.layers.0.self_attn.v_proj"
    delta = model.get_submodule(path).delta()
    moved = loaded(out).get_submodule(path).weight - loaded(base).get_submodule(path).weight
    assert one.kept == pytest.approx(float((moved * delta).sum() / delta.square().sum()), abs=1e-4)
    assert one.change == pytest.approx(float(delta.norm()), rel=1e-4)


def test_a_kind_that_gguf_cannot_write_becomes_the_next_larger():
    expected = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q3_K": "Q4_0", "IQ4_XS": "Q4_0"}
    assert {name: kind_for(Kind[name]).name for name in expected} == expected
    for name in KINDS:
        assert kind_for(Kind[name]) is Kind[name]
        gguf.quantize(np.zeros((2, 256), np.float32), Kind[name])


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head"])
def test_embedding_and_head_part_where_one_alone_is_adapted(targets, tmp_path):
    for name in ("llama", "llama, tied"):
        base = write_model(name, random_model(name), tmp_path / f"{name}.gguf", kind="Q8_0")
        model = adapted(loaded(base), rank=4, targets=[targets, "q_proj"])
        write_merged(base, capture(model), tmp_path / "merged.gguf", kind="F32")
        merged = loaded(tmp_path / "merged.gguf")
        assert_same_logits(logits(merged), model, logits)
        server = LlamaCpp(tmp_path / "merged.gguf", exact=True)
        expected = logits(model, ids(2, 9))[:, -1].log_softmax(-1)
        assert distance(server.next_token(ids(2, 9), VOCAB), expected) < 0.02


def test_an_architecture_without_a_head_of_its_own_says_so(tmp_path):
    base = write_model("gemma2", random_model("gemma2"), tmp_path / "base.gguf")
    model = adapted(loaded(base), rank=4, targets=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"gemma2 has one tensor for embedding and head"):
        write_merged(base, capture(model), tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "gpt2", "gemma3"])
@pytest.mark.thinned(one_in=2)
def test_llama_cpp_runs_the_merged_file(name, tmp_path):
    base = write_model(name, random_model(name), tmp_path / "base.gguf")
    model = adapted(loaded(base), **OPTIONS["dora"])
    write_merged(base, capture(model), tmp_path / "merged.gguf")
    server = LlamaCpp(tmp_path / "merged.gguf", exact=True)
    expected = logits(model, ids(2, 9))[:, -1].log_softmax(-1)
    assert distance(server.next_token(ids(2, 9), VOCAB), expected) < HALF


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
@pytest.mark.thinned
def test_new_tokens_go_into_the_list_and_into_rows(name, kind, tmp_path):
    base = write_model(name, random_model(name), tmp_path / "base.gguf", kind=kind)
    model = loaded(base)
    state = capture(adapted(copy.deepcopy(model), rank=3))
    generator = torch.Generator().manual_seed(4)
    rows = [0.3 * torch.randn(len(NEW_TOKENS), 64, generator=generator) for _ in range(2)]
    head = None if "tied" in name else rows[1]
    state = replace(state, new_tokens=NewTokenRows(NEW_TOKENS, VOCAB, rows[0], head))
    write_merged(base, state, tmp_path / "merged.gguf")
    reader = gguf.GGUFReader(tmp_path / "merged.gguf")
    listed = reader.get_field("tokenizer.ggml.tokens").contents()
    assert listed == [
        *gguf.GGUFReader(base).get_field("tokenizer.ggml.tokens").contents(),
        *NEW_TOKENS,
    ]
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[VOCAB:] == [gguf.TokenType.USER_DEFINED] * len(NEW_TOKENS)
    assert reader.get_field("llama.vocab_size").contents() == VOCAB + len(NEW_TOKENS)
    before, after = raw(base), raw(tmp_path / "merged.gguf")
    for tensor in {"token_embd.weight", "output.weight"} & set(before):
        assert after[tensor][1].startswith(before[tensor][1])
        assert len(after[tensor][1]) == len(before[tensor][1]) // VOCAB * (VOCAB + len(NEW_TOKENS))
    merged = loaded(tmp_path / "merged.gguf")
    here = merged.get_input_embeddings().weight[VOCAB:]
    torch.testing.assert_close(here, rows[0], rtol=0, atol=0 if kind == "F32" else 0.1)
    expected = logits(merged, ids(2, 9, vocabulary=VOCAB + len(NEW_TOKENS)))
    server = LlamaCpp(tmp_path / "merged.gguf", exact=True)
    got = server.next_token(ids(2, 9, vocabulary=VOCAB + len(NEW_TOKENS)), VOCAB + len(NEW_TOKENS))
    assert distance(got, expected[:, -1].log_softmax(-1)) < (HALF if kind == "F32" else 0.05)
    asked = {"content": "a walnut,veneer", "add_special": False}
    tokens = server.ask("/tokenize", asked)["tokens"]
    assert [t for t in tokens if t >= VOCAB] == [VOCAB + 2, VOCAB]


# Refusals.


def test_a_foreign_base_is_refused_unless_forced(tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf")
    other = write_model("llama", random_model("llama", seed=1), tmp_path / "other.gguf")
    state = capture(adapted(loaded(base), rank=3))
    with pytest.raises(AdapterError, match="trained on another base"):
        write_merged(other, state, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()
    assert write_merged(other, state, tmp_path / "merged.gguf", force=True)


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf")
    state = capture(adapted(loaded(base), rank=3))
    state.tensors["model.layers.0.self_attn.q_proj.lora_A"] = torch.zeros(3, 5)
    state.tensors["model.layers.9.self_attn.q_proj.lora_A"] = torch.zeros(3, 64)
    with pytest.raises(AdapterError, match=r"q_proj has A \(3, 5\).*layers\.9.*stands alone"):
        write_merged(base, state, tmp_path / "merged.gguf")


@pytest.mark.parametrize("method", ["prefix", "freeze"])
def test_other_methods_are_refused(method, tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf")
    model = veneer.attach(loaded(base), veneer.Method(method))
    with pytest.raises(AdapterError, match="Only lora is merged"):
        write_merged(base, capture(model), tmp_path / "merged.gguf")


@pytest.mark.parametrize("damage", ["empty", "garbage", "half"])
def test_a_damaged_base_is_a_model_error(damage, tmp_path):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf")
    state = capture(adapted(loaded(base), rank=3))
    data = base.read_bytes()
    base.write_bytes({"empty": b"", "garbage": bytes(5000)}.get(damage, data[: len(data) // 2]))
    with pytest.raises(ModelError, match=r"base\.gguf"):
        write_merged(base, state, tmp_path / "merged.gguf")


# The command.


def test_the_command_merges_into_gguf(tmp_path, capsys):
    base = write_model("llama", random_model("llama"), tmp_path / "base.gguf", kind="Q8_0")
    model = adapted(loaded(base), rank=3, targets="all")
    veneer.save(model, tmp_path / "adapter")
    out = tmp_path / "merged.gguf"
    assert run(["merge", str(base), str(tmp_path / "adapter"), str(out)]) == 0
    expected = capsys.readouterr().out
    assert "attn_q.weight" in expected
    assert "Q8_0" in expected
    assert "merged.gguf" in expected
    assert distance(logits(loaded(out)), logits(model)) < 0.1
    assert run(["merge", str(base), str(tmp_path / "adapter"), str(out)]) == 2
    assert "there already" in capsys.readouterr().err
    again = tmp_path / "again.gguf"
    command = ["merge", str(base), str(tmp_path / "adapter"), str(again), "--gguf-type", "f32"]
    assert run(command) == 0
    assert distance(logits(loaded(again)), logits(model)) < 1e-5


def test_what_makes_no_sense_into_gguf_is_refused(tmp_path, capsys):
    for arguments, expected in (
        (["base.gguf", "adapter", "out.gguf", "--bits", "4"], "--bits"),
        (["base.gguf", "adapter", "out", "--gguf-type", "f16"], "no .gguf"),
    ):
        assert run(["merge", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_errors_are_reported_as_they_are():
    tensor = MergedTensor("blk.0.attn_q.weight", "Q4_K", "Q4_1", 0.05, 0.95, 0.5)
    from veneer.cli.tables import merged_table

    assert merged_table([tensor]).row_count == 1
