"""`veneer inspect` says which layers of a base are computed as two functions, and why others are
not."""

import json
import re

import pytest

from support.every_architecture import small_config
from veneer.cli.app import app
from veneer.cli.console import OUTPUT


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3", "2 of 2 decoder layers, which a run proves before it begins."),
        (
            "qwen3_moe",
            "2 of 2 decoder layers, which a run proves before it begins; of 2, beside a mixture of "
            "experts, attention alone.",
        ),
        ("hrm_text", "no layers: no decoder layers are known."),
        (
            "glm4_moe",
            "2 of 2 decoder layers, which a run proves before it begins; of 1, beside a mixture of "
            "experts, attention alone.",
        ),
    ],
)
def test_it_says_which_layers_are_fused(model_type, expected, tmp_path, capsys):
    config = small_config(model_type)
    config.to_json_file(tmp_path / "config.json")
    assert f"Fused {expected}\n" in shown(tmp_path, capsys)


@pytest.mark.parametrize(
    ("model_type", "dropout", "expected"),
    [
        ("gpt2", "resid_pdrop", "2 of 2 decoder layers"),
        ("falcon", "hidden_dropout", "2 of 2 decoder layers"),  # a run finds that it drops a sum
        ("biogpt", "activation_dropout", "none of 2 decoder layers: it drops something else"),
    ],
)
def test_it_says_whether_dropout_of_the_model_keeps_layers_apart(
    model_type, dropout, expected, tmp_path, capsys
):
    settings = small_config(model_type).to_dict() | {dropout: 0.1, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert expected in shown(tmp_path, capsys)


def test_no_name_is_broken_at_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(OUTPUT, "_width", 80)
    app(["inspect", "qwen3-30b-a3b", "--targets", "all"], result_action="return_value")
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0]: line for line in lines if line.startswith(("self_attn", "mlp."))}
    assert {"self_attn.q_proj", "mlp.experts.gate_up_proj"} <= set(names)
    assert all(re.search(r"\d × \d", line) for line in names.values())


def shown(home, capsys):
    app(["inspect", str(home)], exit_on_error=False, result_action="return_value")
    return capsys.readouterr().out
