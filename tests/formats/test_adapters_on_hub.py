"""Adapters pushed to a hub and pulled from it. The hub is a small server on this machine, which
speaks the routes that huggingface_hub asks for: the real hub is never reached."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import veneer
from support.hub_server import hub
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer.cli.app import run
from veneer.errors import AdapterError, VeneerWarning
from veneer.formats.adapters import read
from veneer.formats.locate import locate
from veneer.formats.measured import licence_of, measured
from veneer.run_directory import RunDirectory

RECIPE = {"model": "org/base", "data": "/home/somebody/secret/rows.jsonl", "lora": {"rank": 2}}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as server:
        for name, value in (
            ("ENDPOINT", server.address),
            (
                "HUGGINGFACE_CO_URL_TEMPLATE",
                server.address + "/{repo_id}/resolve/{revision}/{filename}",
            ),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield server


@pytest.fixture
def adapter(tmp_path) -> Path:
    """The adapter of a run that has ended."""
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets=["q_proj"])))
    model.config._name_or_path = "org/base"
    run = RunDirectory(tmp_path / "run")
    veneer.save(model, run.adapter(), training={"data": "0123abcd", "recipe": RECIPE})
    evaluations = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (2, 1.25))]
    steps = [{"step": n, "loss": loss, "tokens": 50} for n, loss in ((1, 2.5), (2, 2.0))]
    for line in (evaluations[0], *steps, evaluations[1]):
        run.append_metrics(line)
    run.write_progress(steps=2, ended="finished", verdict="It learnt.")
    return run.adapter()


def same(one: Path, other: Path) -> bool:
    ours, theirs = read(one).tensors, read(other).tensors
    return ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


def test_what_is_pushed_is_pulled_again(server, adapter, capsys):
    assert run(["push", str(adapter), "someone/island"]) == 0
    files = server.repositories["someone/island"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert "hf:someone/island" in capsys.readouterr().out
    place = locate(Path("hf:someone/island")).path
    assert same(adapter, place)
    assert locate(Path("hf:someone/island")).base == "org/base"


@pytest.mark.parametrize("silent", ["offline", "broken", "gone"])
def test_where_the_hub_is_silent_the_copy_is_taken_and_announced(
    server, adapter, monkeypatch, silent
):
    assert run(["push", str(adapter), "someone/island"]) == 0
    place = locate(Path("hf:someone/island")).path
    if silent == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif silent == "broken":
        server.refuses = 500
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.warns(VeneerWarning, match="copy that is here is taken"):
        assert locate(Path("hf:someone/island")).path == place


def test_what_the_hub_refuses_is_not_taken_from_a_copy(server, adapter):
    assert run(["push", str(adapter), "someone/island"]) == 0
    locate(Path("hf:someone/island"))
    server.refuses = 403
    with pytest.raises(AdapterError, match="hf auth login"):
        locate(Path("hf:someone/island"))


def test_the_card_says_what_is_known_and_not_where_files_are(adapter, tmp_path, capsys):
    there = tmp_path / "there"
    command = ["push", str(adapter), "someone/island", "--dry-run", str(there)]
    assert run([*command, "--licence", "apache-2.0"]) == 0
    card = (there / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/base"
    for text in ("0123abcd", "rank: 2", "1.2500 (step 2)", "It learnt.", "under apache-2.0"):
        assert text in card, text
    for file in there.iterdir():
        assert b"somebody" not in file.read_bytes(), file
    assert run(["verify", str(there)]) == 0
    capsys.readouterr()
    assert run(["card", str(adapter), "--licence", "apache-2.0"]) == 0
    assert "1.2500 (step 2)" in capsys.readouterr().out
    assert run([*command]) == 2  # it is there already


def test_a_base_that_is_nowhere_on_the_hub_is_announced_and_can_be_named(adapter, tmp_path, capsys):
    config = json.loads((adapter / "lora_config.json").read_text())
    config["base"]["name"] = "/home/somebody/models/mine"
    (adapter / "lora_config.json").write_text(json.dumps(config))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(["push", str(adapter), "someone/island", "--dry-run", str(first)]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "--base OWNER/MODEL" in printed
    assert "licence of the base is not known" in printed
    assert b"somebody" not in (first / "adapter_config.json").read_bytes()
    named = ["--base", "org/mine", "--dry-run", str(second)]
    assert run(["push", str(adapter), "someone/island", *named]) == 0
    assert "--base OWNER/MODEL" not in capsys.readouterr().err
    assert locate(second).base == "org/mine"


@pytest.mark.parametrize(
    ("name", "says"),
    [("hf:nobody/nothing", "it is not there"), ("hf:nothing", "USER/NAME")],
)
def test_what_is_not_there_is_said(server, name, says):
    with pytest.raises(AdapterError, match=says):
        locate(Path(name))


def test_a_model_is_not_pulled_as_an_adapter(server):
    server.repositories["org/base"] = {"config.json": b"{}", "model.safetensors": b"large"}
    with pytest.raises(AdapterError, match="is a model"):
        locate(Path("hf:org/base"))
    assert not any("resolve" in path for _, path in server.asked)


def test_a_hub_that_refuses_is_one_error(server, adapter, capsys):
    server.refuses = 403
    assert run(["push", str(adapter), "someone/island"]) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_the_licence_is_that_in_the_card_beside_the_base(tmp_path):
    assert licence_of("smollm2-135m") == "apache-2.0"
    assert licence_of("/nowhere/at/all") is None
    for text, licence in (
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("# No header\n---\nlicense: mit\n", None),
        ("---\n: [\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == licence


def test_a_card_says_what_answers_were_worth_where_any_had_a_reward(tmp_path):
    run = RunDirectory(tmp_path)
    rewards = {0: None, 2: 0.25, 4: 0.75, 6: 0.5}
    lines = [
        {"step": step, "eval_loss": float("nan") if reward is None else -reward}
        | ({} if reward is None else {"eval_reward": reward})
        for step, reward in rewards.items()
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(run) == {
        "held-out reward, first and last": "0.2500, 0.5000",
        "held-out reward, best": "0.7500 (step 4)",
    }
