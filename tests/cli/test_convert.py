"""`veneer convert`: what it prints, refuses and leaves alone."""

from pathlib import Path
from typing import Any

import loralib
import torch

import veneer
from support.random_adapters import logits, shake
from support.tiny_models import tiny
from veneer.cli.app import run
from veneer.formats.adapters import read

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def made(place: Path, architecture: str = "llama", format: Any = "native", **options: Any) -> Path:
    model = tiny(architecture)
    shake(veneer.attach(model, veneer.LoRA(**({"rank": 3} | options)), seed=3))
    veneer.save(model, place, format=format)
    return place


def printed(capsys: Any) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_folding_is_reported(tmp_path, capsys):
    source = made(tmp_path / "a", init="pissa", alpha_pattern={"q_proj": 5}, rslora=True)
    assert run(["convert", str(source), str(tmp_path / "b"), "--to", "mlx"]) == 0
    output = printed(capsys)
    assert (
        "A₀ and B₀, where pissa started, are folded into the factors: a plain LoRA of rank 6"
        in output
    )
    assert "folded into B" in output
    assert "rsLoRA's alpha / √rank is written as alpha / rank" in output
    assert "(mlx, 8 layers," in output
    assert "from native)" in output
    assert run(["convert", str(source), str(tmp_path / "c"), "--to", "peft"]) == 0
    assert "rank 6 in place of 3" in printed(capsys)


def test_a_plain_adapter_needs_no_note(tmp_path, capsys):
    source = made(tmp_path / "a")
    for to in ("peft", "mlx"):
        assert run(["convert", str(source), str(tmp_path / to), "--to", to]) == 0
        assert "note" not in printed(capsys)


def test_one_rank_for_all(tmp_path, capsys, refused):
    source = made(tmp_path / "a", rank_pattern={"q_proj": 5})
    assert run(["convert", str(source), str(tmp_path / "b"), "--to", "peft", "--rank", "16"]) == 0
    assert "One rank for all layers, 16" in printed(capsys)
    assert read(tmp_path / "b").config.rank == 16
    error = refused("convert", source, tmp_path / "c", "--to", "peft", "--rank", "4")
    assert "Rank 4 is too low" in error


def test_loralib_with_its_alpha_and_parts(tmp_path, refused):
    model = tiny("gpt2")
    for block in range(2):
        attention = model.transformer.h[block].attn
        layer = loralib.MergedLinear(
            32, 96, r=2, lora_alpha=5, enable_lora=[True, False, True], fan_in_fan_out=True
        )
        attention.c_attn = layer
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
    file = tmp_path / "lora.pt"
    torch.save(loralib.lora_state_dict(model), file)
    assert "--alpha" in refused("convert", file, tmp_path / "out", "--to", "native")
    arguments = [file, tmp_path / "out", "--to", "native", "--alpha", "5"]
    assert "--enable-lora 101" in refused("convert", *arguments)
    assert "takes a 1 or a 0" in refused("convert", *arguments, "--enable-lora", "yes")
    assert run(["convert", *map(str, arguments), "--enable-lora", "101"]) == 0
    state = read(tmp_path / "out")
    assert {layer.path for layer in state.layers()} == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    }
    assert state.config.scaling_of("transformer.h.0.attn.c_attn") == 2.5


def test_a_base_by_name(tmp_path, capsys, minigpt_home, refused):
    """Its structure alone is read, and that the adapter belongs to it is seen."""
    base = veneer.load_base(str(minigpt_home))
    shake(veneer.attach(base.model, veneer.LoRA(rank=2, targets="embed_tokens")))
    veneer.save(base.model, tmp_path / "a")
    out = tmp_path / "b"
    command = ["convert", str(tmp_path / "a"), str(out), "--to", "loralib"]
    assert run([*command, "--base", str(minigpt_home)]) == 0
    assert "(loralib, 1 layer," in printed(capsys)
    again = veneer.load(veneer.load_base(str(minigpt_home)).model, out)
    torch.testing.assert_close(logits(again), logits(base.model), **CLOSE)
    other = made(tmp_path / "other")
    assert "nowhere" in refused(
        "convert", other, tmp_path / "c", "--to", "peft", "--base", "nowhere"
    )


def test_what_cannot_be_ends_with_one_error(tmp_path, refused):
    dora, out = made(tmp_path / "dora", dora=True), tmp_path / "x"
    assert "DoRA's magnitudes" in refused("convert", dora, out, "--to", "loralib")
    assert "no adapter directory" in refused("convert", tmp_path / "no", out, "--to", "peft")
    assert "mlx" in refused("convert", dora, out, "--to", "onnx")
    assert "--to" in refused("convert", dora, out)
    error = refused("convert", dora, out, "--to", "peft", "--alpha", "3")
    assert "alpha would do nothing" in error
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(tmp_path, refused):
    source, out = made(tmp_path / "a"), tmp_path / "b"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for force in ([], ["--force"]):
        assert "holds" in refused("convert", source, out, "--to", "peft", *force)
    assert (out / "letter.txt").read_text() == "mine"
    other = made(tmp_path / "c", format="peft")
    assert "--force" in refused("convert", source, other, "--to", "peft")
    assert run(["convert", str(source), str(other), "--to", "peft", "--force"]) == 0


def test_no_half_adapter_is_left(tmp_path, refused):
    source = made(tmp_path / "a", "llama", targets="embed_tokens")
    error = refused("convert", source, tmp_path / "x" / "y", "--to", "mlx")
    assert "--base" in error
    assert not (tmp_path / "x").exists()
