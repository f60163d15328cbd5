"""`veneer check`: what runtimes make of an adapter, by rules that were read in their source."""

import json
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from support.every_architecture import small
from support.peft_cases import base as peft_base
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer.cli.app import run
from veneer.errors import AdapterError
from veneer.formats.names import RuntimeName
from veneer.formats.runtimes.check import RUNTIMES, check

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
PEFT_READERS = ("vllm", "sglang", "tgi", "peft")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def made(place: Path, architecture: str = "llama", format: Any = "peft", **options: Any) -> Path:
    model = tiny(architecture)
    settings = {"rank": 8, "targets": "all"} | options
    shake(veneer.attach(model, veneer.LoRA(**settings), seed=3))
    veneer.save(model, place, format=format)
    return place


def edit(place: Path, **changes: Any) -> Path:
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | changes))
    return place


def verdicts(place: Path, runtime: RuntimeName) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in check(place, runtime).findings}


def refused(place: Path, runtime: RuntimeName) -> set[str]:
    return {what for what, verdict in verdicts(place, runtime).items() if verdict == "no"}


def test_the_table_is_complete_and_says_what_was_read():
    assert set(RUNTIMES) == set(get_args(RuntimeName))
    for runtime in RUNTIMES.values():
        assert runtime.read_in
        assert set(runtime.formats) == set(runtime.rules)


@pytest.mark.parametrize("runtime", PEFT_READERS)
def test_a_plain_adapter_loads(runtime, tmp_path):
    assert refused(made(tmp_path / "a"), runtime) == set()
    assert check(made(tmp_path / "b", targets="attention"), runtime).loads


# By what is wrong with an adapter: the runtimes that refuse it, and what they name.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, set[str]]]] = {
    "dora": (
        {"dora": True},
        {},
        {
            "vllm": {"use_dora", "key names"},
            "sglang": {"use_dora", "key names"},
            "tgi": {"use_dora"},
        },
    ),
    "rslora": ({"rslora": True}, {}, {"sglang": {"use_rslora"}}),
    "rank_pattern": (
        {"rank_pattern": {"q_proj": 4}},
        {},
        {"sglang": {"rank_pattern"}, "tgi": {"rank_pattern"}},
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"q_proj": 4}},
        {},
        {"sglang": {"alpha_pattern"}, "tgi": {"alpha_pattern"}},
    ),
    "embedding": ({"targets": ["q_proj", "v_proj", "embed_tokens"]}, {}, {"tgi": {"layers"}}),
    "k alone": ({"targets": "k_proj"}, {}, {"sglang": {"stacked layers"}}),
    "q alone": ({"targets": "q_proj"}, {}, {"sglang": {"stacked layers"}}),
    "q and v": ({"targets": "qv"}, {}, {}),
    "up alone": ({"targets": "up_proj"}, {}, {"sglang": {"stacked layers"}}),
    "last block": ({"layers": "-1"}, {}, {"tgi": {"blocks"}}),
    "rank 3": ({"rank": 3}, {}, {"tgi": {"rank"}}),
    "rank 48": ({"rank": 48}, {}, {}),
    "rank 600": ({"rank": 600}, {}, {"vllm": {"rank"}, "tgi": {"rank"}}),
    "bias": (
        {},
        {"bias": "all"},
        {"vllm": {"bias=all"}, "sglang": {"bias=all"}, "tgi": {"bias=all"}},
    ),
    "lora_bias": (
        {},
        {"lora_bias": True},
        {"vllm": {"lora_bias"}, "sglang": {"lora_bias"}, "tgi": {"lora_bias"}},
    ),
    "modules_to_save": (
        {},
        {"modules_to_save": ["lm_head"]},
        {name: {"modules_to_save"} for name in ("vllm", "sglang", "tgi")},
    ),
    "a classifier": (
        {},
        {"modules_to_save": ["score"]},
        {name: {"modules_to_save"} for name in ("sglang", "tgi")},
    ),
    "pissa by PEFT": (
        {},
        {"init_lora_weights": "pissa_niter_4"},
        {"vllm": {"init_lora_weights=pissa_niter_4"}},
    ),
    "gaussian": ({}, {"init_lora_weights": "gaussian"}, {}),
    "a pattern": ({}, {"target_modules": r".*\.q_proj"}, {"sglang": {"target_modules"}}),
    "all-linear": ({}, {"target_modules": "all-linear"}, {}),
    "replication": ({}, {"layer_replication": [[0, 1]]}, {"vllm": {"layer_replication"}}),
    "aLoRA": (
        {},
        {"alora_invocation_tokens": [3]},
        {name: {"alora_invocation_tokens"} for name in ("vllm", "sglang", "tgi")},
    ),
    "another method": (
        {},
        {"peft_type": "LOHA"},
        {name: {"peft_type"} for name in ("vllm", "sglang", "tgi")},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_runtime_cannot_do_is_named(case, tmp_path):
    options, changes, names = REFUSED[case]
    place = edit(made(tmp_path / "a", **options), **changes)
    for runtime in PEFT_READERS:
        assert refused(place, runtime) == names.get(runtime, set()), runtime


@pytest.mark.parametrize(
    ("base", "stacks", "refusing"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", STACKS, {"sglang", "tgi", "ollama"}),
        ("Qwen/Qwen3.5-35B-A3B", STACKS, {"sglang", "tgi", "ollama"}),
        ("openai/gpt-oss-20b", STACKS[:1], {"vllm", "sglang", "tgi", "ollama"}),
    ],
)
def test_whether_adapters_of_experts_act_is_said(base, stacks, refusing, tmp_path):
    model = peft_base("mixtral")
    veneer.attach(model, veneer.LoRA(rank=8, targets=["attention", *stacks]), seed=3)
    veneer.save(shake(model), tmp_path / "a", format="peft")
    edit(tmp_path / "a", base_model_name_or_path=base, rank_pattern={}, alpha_pattern={})
    for runtime in (*PEFT_READERS, "ollama"):
        name = "layers" if runtime == "tgi" else "experts"
        assert (name in refused(tmp_path / "a", runtime)) == (runtime in refusing), runtime
    findings = {finding.what: finding for finding in check(tmp_path / "a", "vllm").findings}
    assert findings["rank"].says.startswith("8")
    splits = "--enable-mixed-moe-lora-format" in findings["experts"].do
    assert splits == ("Mixtral" in base)
    veneer.save(model, tmp_path / "a.gguf", format="gguf")
    for runtime, verdict in (("llama.cpp", "ok"), ("ollama", "no")):
        assert verdicts(tmp_path / "a.gguf", runtime)["experts"] == verdict


def test_layers_beside_experts_that_only_their_weights_name(tmp_path):
    model = small("glm4_moe")
    veneer.attach(
        model, veneer.LoRA(rank=8, targets=["q_proj", "v_proj", "shared_experts.down_proj"]), seed=3
    )
    veneer.save(shake(model), tmp_path / "a", format="peft")
    assert refused(tmp_path / "a", "sglang") >= {"target_parameters"}
    assert "experts" not in verdicts(tmp_path / "a", "sglang")
    assert check(tmp_path / "a", "vllm").loads


@pytest.mark.parametrize(
    ("rank", "flag"),
    [(1, None), (16, None), (17, "32"), (33, "64"), (129, "256"), (257, "320"), (512, "512")],
)
def test_the_flag_for_a_rank(rank, flag, tmp_path):
    place = edit(made(tmp_path / "a", rank=1), r=rank)
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "rank")
    assert finding.verdict == ("ok" if flag is None else "needs")
    assert finding.do == ("" if flag is None else f"--max-lora-rank {flag}")


def test_the_rank_of_a_pattern_counts(tmp_path):
    place = made(tmp_path / "a", rank_pattern={"q_proj": 24})
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "rank")
    assert finding.do == "--max-lora-rank 32"


@pytest.mark.parametrize("runtime", ["sglang", "tgi"])
@pytest.mark.parametrize(
    "options",
    [
        {"rslora": True},
        {"rank": 3},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}},
        {"init": "pissa", "rank": 5},
    ],
)
def test_what_is_advised_helps(options, runtime, tmp_path):
    """The command that a finding names is carried out, and the adapter loads after that."""
    place = made(tmp_path / "a", format="native", **options)
    todo = [f.do for f in check(place, runtime).findings if f.verdict == "no"]
    advised = max(todo, key=lambda command: "--rank" in command)
    command = advised.replace("ADAPTER", str(place)).replace("OUT", str(tmp_path / "b")).split()
    assert command[:2] == ["veneer", "convert"]
    assert run(command[1:]) == 0
    assert check(tmp_path / "b", runtime).loads


@pytest.mark.parametrize("runtime", PEFT_READERS)
def test_key_names(runtime, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    place = made(tmp_path / "a")
    tensors = load_file(place / WEIGHTS)
    tensors[f"{key}.default.weight"] = tensors.pop(f"{key}.weight")
    save_file(tensors, place / WEIGHTS)
    names = refused(place, runtime)
    assert "key names" in names or runtime == "tgi"
    if runtime in ("vllm", "peft"):
        assert names == {"key names"}


def test_peft_passes_over_keys_without_its_prefix(tmp_path):
    place = made(tmp_path / "a")
    tensors = load_file(place / WEIGHTS)
    save_file({k.removeprefix("base_model.model."): t for k, t in tensors.items()}, place / WEIGHTS)
    assert refused(place, "peft") == {"key names"}


def test_new_tokens_are_seen(tmp_path):
    place = made(tmp_path / "a")
    (place / "added_tokens.json").write_text('{"veneer": 96}')
    assert refused(place, "sglang") == {"added_tokens.json"}


@pytest.mark.parametrize("runtime", PEFT_READERS)
@pytest.mark.parametrize("format", ["native", "mlx", "loralib"])
def test_other_formats_are_to_be_converted_first(format, runtime, tmp_path):
    place = made(tmp_path / "a", format=format)
    assert refused(place, runtime) == {"format"}
    (finding,) = (f for f in check(place, runtime).findings if f.what == "format")
    assert finding.do == "veneer convert ADAPTER --to peft OUT"


def test_what_conversion_would_refuse_is_named_too(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.Method("full"))
    veneer.save(model, tmp_path / "full")
    assert refused(tmp_path / "full", "vllm") == {"format", "conversion"}


# MLX.


def test_mlx(tmp_path):
    place = made(tmp_path / "a", format="mlx")
    assert refused(place, "mlx") == set()
    assert refused(made(tmp_path / "peft"), "mlx") == {"format"}
    assert refused(made(tmp_path / "gpt2", "gpt2"), "mlx") == {"format", "conversion"}
    config = json.loads((place / CONFIG).read_text())
    settings = config["lora_parameters"]
    for changes, names in (
        ({"fine_tune_type": "other"}, {"fine_tune_type"}),
        ({"lora_parameters": settings | {"alpha": 16}}, {"alpha"}),
        ({"lora_parameters": {"rank": 8}}, {"settings"}),
        ({"lora_parameters": settings | {"rank": 4}}, {"rank"}),
    ):
        (place / CONFIG).write_text(json.dumps(config | changes))
        assert refused(place, "mlx") == names
    (place / CONFIG).write_text(json.dumps(config))
    tensors = load_file(place / "adapters.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(32)}, place / "adapters.safetensors")
    assert refused(place, "mlx") == {"key names"}


# GGUF.


def write_gguf(path: Path, *, kind: str = "lora", more: tuple[str, ...] = ()) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", 16.0)
    for name in ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b", *more):
        writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_files(monkeypatch):
    """Recognise GGUF files by their name, whatever reads them."""
    from dataclasses import replace

    from veneer.formats import table as formats

    known = replace(formats.FORMATS["gguf"], detects=lambda path: path.suffix == ".gguf")
    monkeypatch.setitem(formats.FORMATS, "gguf", known)


@pytest.mark.parametrize("runtime", ["llama.cpp", "ollama"])
def test_gguf(runtime, tmp_path, gguf_files):
    assert refused(write_gguf(tmp_path / "a.gguf"), runtime) == set()
    assert refused(write_gguf(tmp_path / "b.gguf", kind="control"), runtime) == {"adapter.type"}
    alone = write_gguf(tmp_path / "c.gguf", more=("blk.0.attn_k.weight.lora_a",))
    assert refused(alone, runtime) == {"tensors"}
    norm = write_gguf(tmp_path / "d.gguf", more=("blk.0.attn_norm.weight",))
    assert refused(norm, runtime) == {"norms"}
    (tmp_path / "e.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    with pytest.raises(AdapterError, match="GGUF"):
        check(tmp_path / "e.gguf", runtime)


def test_what_is_no_gguf_is_to_be_converted(tmp_path):
    place = made(tmp_path / "a")
    assert refused(place, "llama.cpp") == {"format"}
    (finding,) = (f for f in check(place, "llama.cpp").findings if f.what == "format")
    assert finding.do == "veneer convert ADAPTER --to gguf OUT.gguf --base BASE"


def test_ollama_on_its_own(tmp_path):
    assert refused(made(tmp_path / "a", targets="mlp"), "ollama") == set()
    assert refused(made(tmp_path / "b"), "ollama") == {"q_proj, k_proj"}
    assert refused(made(tmp_path / "c", targets="mlp", alpha=2.5), "ollama") == {"lora_alpha"}
    assert "layers" in refused(made(tmp_path / "d", targets="embed_tokens"), "ollama")


# The command.


def test_it_prints_findings_and_its_code_is_the_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    place = made(tmp_path / "a", rank=24)
    assert run(["check", str(place), "--for", "vllm"]) == 0
    output = capsys.readouterr().out
    assert "--max-lora-rank 32" in output
    assert "vLLM 0.32.0: will load" in output
    assert "run by make proof-vllm too" in output
    assert run(["check", str(made(tmp_path / "b", dora=True)), "--for", "vllm"]) == 1
    output = capsys.readouterr().out
    assert "veneer merge BASE ADAPTER OUT" in output
    assert "will not load as it is" in output
    assert run(["check", str(place), "--for", "sglang"]) == 0
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--for", "vllm"], "no adapter directory nowhere"),
        (["nowhere"], "--for"),
        (["nowhere", "--for", "onnx"], "onnx"),
    ],
)
def test_a_bad_call(arguments, says, capsys):
    assert run(["check", *arguments]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("runtime", PEFT_READERS)
def test_damage_is_named(runtime, tmp_path, capsys):
    place = made(tmp_path / "a")
    for changes in (
        {"rank_pattern": [1]},
        {"modules_to_save": 3},
        {"alpha_pattern": "q"},
    ):
        edit(place, **changes)
        assert run(["check", str(place), "--for", runtime]) == 2
        assert next(iter(changes)) in capsys.readouterr().err
        edit(place, **dict.fromkeys(changes))
    (place / WEIGHTS).write_bytes(b"\x10" * 30)
    assert run(["check", str(place), "--for", runtime]) == 2
    assert WEIGHTS in capsys.readouterr().err
