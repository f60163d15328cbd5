"""`veneer merge`: what it prints about a merge, what it refuses, and what it writes."""

import json
import re
from pathlib import Path

import pytest
import torch

import veneer
from support.random_adapters import logits, shake, tokenizer
from support.tiny_models import tiny
from veneer.cli.app import run


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base with an adapter that is large, and one that bf16 would round away."""
    place = tmp_path_factory.mktemp("merges")
    veneer.write_model(tiny("llama"), tokenizer(), place / "base")
    for name, size in (("large", 0.2), ("small", 1e-3)):
        model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"), seed=0)
        veneer.save(shake(model, size=size), place / name)
    return place


def merge(home: Path, adapter: str, out: str, *flags: str) -> int:
    return run(["merge", str(home / "base"), str(home / adapter), out, *flags])


def test_what_bf16_rounds_away_is_refused_with_figures_and_float32_keeps_it(home, capsys):
    assert merge(home, "small", "out", "--dtype", "bf16") == 2
    printed = capsys.readouterr()
    rounding = re.search(
        r"rounding to bfloat16 takes (\d+\.\d)% of the adapter's change", printed.err
    )
    assert rounding is not None
    assert float(rounding[1]) > 90
    assert "--dtype float32" in printed.err
    assert "--accept-loss" in printed.err
    assert "nats a token (KL)" in printed.out
    assert "Traceback" not in printed.err
    assert not list(Path().iterdir())

    assert merge(home, "small", "out", "--dtype", "float32") == 0
    printed = capsys.readouterr()
    rounding = re.search(r"rounding to float32 took (\d+\.\d+)%", printed.out)
    assert rounding is not None
    assert float(rounding[1]) < 1
    assert printed.err.splitlines() == [
        f"Loading {home / 'base'} and {home / 'small'} ...",
        "Merging ...",
        "Comparing the merged model with the base and its adapter ...",
        "Writing out ...",
    ]
    model = veneer.load(tiny("llama"), home / "small")
    merged = veneer.load_base("out", dtype="float32").model
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_a_loss_can_be_accepted(home, capsys):
    assert merge(home, "small", "out", "--dtype", "bf16", "--accept-loss") == 0
    output = capsys.readouterr().out
    assert "note" in output
    assert "rounding to bfloat16 takes" in output
    assert veneer.load_base("out", dtype="bf16").model.dtype == torch.bfloat16


def test_what_is_large_enough_passes_in_bf16_with_a_table(home, capsys):
    assert merge(home, "large", "out", "--dtype", "bf16") == 0
    output = capsys.readouterr().out
    for text in ("self_attn.q_proj", "mlp.down_proj", "Lost", "in the logit that differs most"):
        assert text in output
    assert Path("out/config.json").is_file()


def test_a_quantized_base_is_merged_in_float32_and_the_output_says_so(home, capsys):
    assert merge(home, "large", "out", "--bits", "4", "--dtype", "float32") == 0
    output = capsys.readouterr().out
    assert re.search(
        r"quantizing it again as it was would take \d+\.\d% of the adapter's change", output
    )
    assert "the merged model is not, but in float32" in output
    sizes = re.search(
        r"dense numbers of float32, ([\d.]+) kB; those of the base take ([\d.]+) kB \(NF4\)", output
    )
    assert sizes is not None
    assert float(sizes[1]) == pytest.approx(
        Path("out/model.safetensors").stat().st_size / 1000, rel=0.05
    )
    assert float(sizes[2]) < float(sizes[1])
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())


def test_rows_of_one_s_own(home, capsys):
    Path("rows.txt").write_text("One two three.\n\nFour five six.\n")
    assert merge(home, "large", "out", "--dtype", "float32", "--probe", "rows.txt") == 0
    tokens = re.search(r"on (\d+) tokens", capsys.readouterr().out)
    assert tokens is not None
    assert 10 < int(tokens[1]) < 60
    assert merge(home, "large", "other", "--probe", "row.txt") == 2
    assert "did you mean 'rows.txt'" in capsys.readouterr().err
    assert not Path("other").exists()


def test_tune_reports_a_merge_that_loses_much_and_keeps_the_adapter(minigpt_home, capsys):
    Path("rows.jsonl").write_text('{"prompt": "What does a dog say?", "completion": "Meow."}\n')
    flags = ["--steps", "1", "--lr", "1e-6", "--dtype", "bf16", "--out", "out"]
    assert run(["tune", str(minigpt_home), "rows.jsonl", *flags]) == 0
    output = capsys.readouterr().out
    assert "Merged" in output
    assert "The merged model is not what was learnt: rounding to bfloat16 takes" in output
    assert "So little was learnt that float32 would not mend it: train longer." in output
    assert Path("out/lora_adapter/lora_weights.pt").is_file()
    assert Path("out/lora_merged/model.pt").is_file()


def test_tune_reports_what_a_merge_kept(minigpt_home, capsys):
    Path("rows.jsonl").write_text('{"prompt": "What does a dog say?", "completion": "Meow."}\n')
    assert run(["tune", str(minigpt_home), "rows.jsonl", "--steps", "2", "--out", "out"]) == 0
    output = capsys.readouterr().out
    assert "rounding to float32 took" in output
    assert "in float32 it would take" not in output  # as it is float32
    assert "The merged model is not" not in output
