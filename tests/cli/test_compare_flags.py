"""Every flag of `veneer compare` arrives in its config."""

from dataclasses import fields, replace
from pathlib import Path

import veneer.compare.run
from veneer.cli.app import run
from veneer.compare.config import CompareConfig
from veneer.errors import VeneerError

COMPARED: dict[str, tuple[str, object]] = {
    "methods": ("lora,full", ("lora", "full")),
    "ranks": ("1,4", (1, 4)),
    "target_sets": ("qv,all", ("qv", "all")),
    "budget": ("minutes:5", "minutes:5"),
    "seeds": ("3", 3),
    "seed": ("7", 7),
    "test": ("test.jsonl", Path("test.jsonl")),
    "test_rows": ("9", 9),
    "max_new_tokens": ("12", 12),
    "general": ("general.txt", Path("general.txt")),
    "eval_rows": ("5", 5),
    "limit": ("50", 50),
    "max_length": ("77", 77),
    "tokens_per_step": ("512", 512),
    "lr": ("", {"lora+": 2e-4}),
    "range_test": ("", True),
    "together": ("", True),
    "device": ("cpu", "cpu"),
    "dtype": ("bf16", "bf16"),
}


def test_every_flag_of_compare_arrives(monkeypatch):
    seen = []

    def catch(*arguments, **options):
        seen.append((arguments, options))
        raise VeneerError("This comparison is not run.")

    monkeypatch.setattr(veneer.compare.run, "compare", catch)
    assert list(COMPARED) == [field.name for field in fields(CompareConfig)]
    assert run(["compare", "m", "d.jsonl"]) == 2
    (model, data, config), options = seen.pop()
    assert (model, data, config) == ("m", Path("d.jsonl"), CompareConfig())
    switches = {"resume": False, "force": False}
    assert options == {"out": Path("dist/comparison"), **switches}
    for name, (given, arrived) in COMPARED.items():
        assert getattr(config, name) != arrived
        option = f"--{name.replace('_', '-')}"
        flags = [option] if arrived is True else [option, given]
        flags = ["--lr.lora+", "2e-4"] if name == "lr" else flags
        beside = ["--test", "t"] if name == "test_rows" else []
        assert run(["compare", "m", "d.jsonl", *flags, *beside]) == 2
        (_, _, config), _ = seen.pop()
        usual = CompareConfig(test=Path("t")) if beside else CompareConfig()
        assert config == replace(usual, **{name: arrived})
    for name in switches:
        assert run(["compare", "m", "d.jsonl", f"--{name}", "--out", "o"]) == 2
        assert seen.pop()[1] == {"out": Path("o"), **switches, name: True}
