"""`veneer verify`: files of adapters, checkpoints, models and runs beside their checksums."""

import shutil

import pytest
import torch

import veneer
from support.random_adapters import examples, shake
from support.tiny_models import tiny
from veneer.cli.app import run
from veneer.files import write_tensors


@pytest.fixture
def directory(tmp_path):
    """A run's checkpoints, and an adapter beside them."""
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), seed=0)
    course = veneer.TrainConfig(steps=3, save_every=1)
    list(veneer.train(model, examples([9, 9]), course, directory=tmp_path / "run" / "checkpoints"))
    veneer.save(shake(model), tmp_path / "run" / "lora_adapter")
    return tmp_path / "run"


def flip(path, at: int = -30) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_run_is_verified_directory_by_directory(directory, capsys):
    assert run(["verify", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.count("whole") == 3  # two checkpoints, and the adapter
    flip(directory / "checkpoints" / "step-000002" / "state.safetensors")
    (directory / "lora_adapter" / "lora_weights.pt").unlink()
    (directory / "lora_adapter" / "mine").write_text("")
    assert run(["verify", str(directory)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("whole") == 1
    assert "lora_weights.pt: missing" in out
    assert "state.safetensors: not as it was written" in out


def test_what_has_no_checksums_is_read(directory, tmp_path, capsys):
    for file in directory.rglob("SHA256SUMS"):
        file.unlink()
    assert run(["verify", str(directory)]) == 0
    assert capsys.readouterr().out.count("no checksums") == 3
    write_tensors(tmp_path / "b" / "x.safetensors", {"a": torch.tensor([1.0, torch.nan])})
    write_tensors(tmp_path / "b" / "y.pt", {"c": torch.ones(2)})
    assert run(["verify", str(tmp_path / "b"), str(directory)]) == 1
    assert "numbers in a are not finite" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "b" / "x.safetensors").write_bytes(b"\x10" * 9)
    assert run(["verify", str(tmp_path / "b")]) == 1


def test_leftovers_are_named(directory, capsys):
    shutil.copytree(directory / "lora_adapter", directory / ".lora_adapter.partial-abcd_123")
    assert run(["verify", str(directory)]) == 0
    assert "left by a killed process" in " ".join(capsys.readouterr().out.split())


def test_names_like_leftovers_and_a_trainers_state_are_no_damage(directory, capsys):
    kept = directory / "lora_adapter.old-2026"
    (directory / "lora_adapter").rename(kept)
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, directory / "optimizer.pt")
    assert run(["verify", str(directory)]) == 0
    flip(kept / "lora_weights.pt")
    assert run(["verify", str(directory)]) == 1


def test_nothing_to_verify(tmp_path, capsys):
    assert run(["verify", str(tmp_path)]) == 2
    assert run(["verify", str(tmp_path / "x")]) == 2
    assert "is no directory" in capsys.readouterr().err
