"""`veneer tune` from end to end on a MiniGPT: what a run prints, leaves and refuses."""

import json
import re

import pytest
import yaml

from support.tuned_facts import (
    ADAPTER_FILES,
    FACTS,
    MERGED_FILES,
    metrics,
    names,
    same_weights,
    weights,
    write_rows,
)
from veneer.cli.app import run


@pytest.mark.draws
def test_a_run_leaves_exactly_what_was_promised(tune, minigpt_home, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 4, "--rank", 4) == 0
    kept = {
        "lora_adapter",
        "lora_merged",
        "metrics.jsonl",
        "progress.json",
        "loss.png",
        "recipe.yaml",
    }
    assert names(out) == kept | {"checkpoints"}
    assert names(out / "lora_adapter") == ADAPTER_FILES
    assert names(out / "lora_merged") == MERGED_FILES
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert names(tmp_path) == {"facts.jsonl", "out"}

    tensors = weights(out)
    assert len(tensors) == 2 * 4 * 4  # A and B of four projections in four blocks
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    assert all(t.shape in ((4, 64), (64, 4)) for t in tensors.values())
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert (config["rank"], config["alpha"], config["init"]) == (4, 8.0, "gaussian")
    assert config["base"]["name"] == str(minigpt_home)

    printed = capsys.readouterr().out
    assert "6 rows" in printed
    assert "8,192 of" in printed  # parameters: 16 projections of 512
    assert "step 4/4" in printed


def test_metrics_are_one_line_a_step(tune, tmp_path):
    out = tmp_path / "out"
    assert tune("--out", out, "--epochs", 3, "--tokens-per-step", 48, "--eval-rows", 2) == 0
    lines = metrics(out)
    steps = [line for line in lines if "loss" in line]
    keys = ["step", "loss", "lr", "tokens", "label_tokens", "seconds", "rss_bytes"]
    assert all(list(line) == keys for line in steps)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(0 < line["label_tokens"] < line["tokens"] <= 48 for line in steps)
    evaluations = [line for line in lines if "loss" not in line]
    assert len(evaluations) == 1 + 3  # before the first step, and one an epoch
    for line in evaluations:
        assert {"step", "eval_loss"} <= line.keys()


def test_the_recipe_repeats_the_run_to_the_bit(tune, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    flags = ("--epochs", 2, "--lr", 0.01, "--dropout", 0.1, "--targets", "q_proj,linear1")
    assert tune("--out", first, *flags, "--rank-pattern.linear1", 2, "--tokens-per-step", 64) == 0
    assert run(["tune", "--config", str(first / "recipe.yaml"), "--out", str(again)]) == 0
    assert same_weights(first, again)
    was, now = (yaml.safe_load((out / "recipe.yaml").read_text()) for out in (first, again))
    assert was | {"out": str(again)} == now
    other = tmp_path / "other"
    recipe = str(first / "recipe.yaml")
    assert run(["tune", "--config", recipe, "--out", str(other), "--seed", "1"]) == 0
    assert not same_weights(first, other)


def test_an_earlier_run_is_not_overwritten_without_force(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert tune("--out", out, "--steps", 3, "--lr", 0.01) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in (str(out), "--resume", "--force", "--out"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "notes.txt").write_text("mine")
    assert tune("--out", out, "--steps", 3, "--lr", 0.01, "--force") == 0
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    assert names(out / "checkpoints") == {"step-000003"}
    assert (out / "notes.txt").read_text() == "mine"


def test_resuming_with_other_settings_is_refused_and_changes_nothing(tune, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert tune("--out", tmp_path / "ouz", "--steps", 2, "--resume") == 2
    error = "".join(capsys.readouterr().err.split())
    assert f"Didyoumean{out}?Nametherun'sdirectoryby--out" in error
    assert "ouz" not in names(tmp_path)
    assert tune("--out", out, "--steps", 2, "--rank", 3, "--seed", 5, "--resume") == 2
    printed, error = capsys.readouterr()
    error = " ".join(error.split())
    assert "go on so: rank (8 there, 3 here); seed (0 there, 5 here). Either" in error
    assert "--from" not in error  # an adapter of that rank
    assert "Plan" not in printed  # nothing is loaded for it
    rows = data.read_bytes()
    write_rows(data, FACTS[:-1])
    assert tune("--out", out, "--steps", 2, "--resume") == 2
    printed, error = capsys.readouterr()
    assert "so: data (not the same). Either name that run's rows;" in " ".join(error.split())
    assert "Data" not in printed
    data.write_bytes(rows)
    assert tune("--out", out, "--steps", 2, "--seed", 5, "--resume") == 2
    error = "".join(capsys.readouterr().err.split())
    assert "so:seed(0there,5here).Either" in error
    assert f"--from{out / 'lora_adapter'}--out" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert tune("--out", out, "--steps", 4, "--lr", 0.01, "--resume") == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "Going on from step 3 of 4 with steps 4 (2 before), lr 0.01 (0.005 before);" in printed
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    adapter = out / "lora_adapter" / "lora_weights.pt"
    assert adapter.read_bytes() != before[adapter]


def test_a_checkpoint_that_names_no_run_is_refused(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 0
    state = out / "checkpoints" / "step-000002" / "state.json"
    numbers = json.loads(state.read_text())
    del numbers["identity"]
    state.write_text(json.dumps(numbers))
    (state.parent / "SHA256SUMS").unlink()
    capsys.readouterr()
    assert tune("--out", out, "--steps", 2, "--resume") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "does not say which run it belongs to" in error
    assert "--force" in error
    assert "Traceback" not in error


def test_a_result_place_that_is_a_file_is_refused_before_training(tune, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert tune("--out", tmp_path / "out", "--steps", 1) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_held_out_rows_are_not_trained_on(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--eval-rows", 2, "--epochs", 1, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "4 rows" in printed
    assert "2 rows held out" in printed
    trained = re.findall(r">>(.*?)<<", printed.partition("trained tokens in >> <<:")[2], re.DOTALL)
    assert any(answer in piece for _, answer in FACTS for piece in trained)
    assert tune("--eval-rows", len(FACTS), "--out", tmp_path / "none") == 2
    assert "leave none to train on" in capsys.readouterr().err


@pytest.mark.draws
def test_a_file_to_evaluate_on_is_evaluated_on(tune, data, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--eval-data", data, "--eval-every", 2, "--steps", 4, "--lr", 0.01)
    flags = (*flags, "--tokens-per-step", 128)
    assert tune("--out", out, *flags) == 0
    printed = capsys.readouterr().out
    assert "6 rows to evaluate on" in printed
    assert "held out" not in printed
    evaluations = [line for line in metrics(out) if "eval_loss" in line]
    assert {line["step"] for line in evaluations} >= {2, 4}
    # Evaluated on what it learns, it gets better.
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_patience_ends_the_run_and_keeps_the_best_weights(tune, tmp_path, capsys):
    # At a constant rate a shorter run has the very steps of a longer one.
    flags = ("--eval-rows", 2, "--eval-every", 1, "--lr", 0.0005, "--seed", 1)
    flags = (*flags, "--schedule", "constant", "--warmup", 0)
    out, short = tmp_path / "out", tmp_path / "short"
    assert tune("--out", out, *flags, "--patience", 2, "--steps", 80) == 0
    assert "no better evaluation" in capsys.readouterr().out
    losses = [line["eval_loss"] for line in metrics(out) if "eval_loss" in line]
    best = losses.index(min(losses))  # the first is of step 0
    assert best > 1
    assert len(losses) - 1 == best + 2 < 80
    assert tune("--out", short, *flags, "--steps", best) == 0
    assert same_weights(out, short)


def test_inspect_shows_what_would_train_before_anything_does(minigpt_home, tmp_path, capsys):
    for model in (str(minigpt_home), "minigpt"):
        assert run(["inspect", model, "--rank", "4"]) == 0
        printed = capsys.readouterr().out
        assert "16 layers adapted; 8,192 of 281,984 parameters train" in " ".join(printed.split())
        rows = [line.split() for line in printed.splitlines() if "_proj" in line]
        assert len(rows) == 4
        assert all({"64", "4", "512", "12.50%", "2,048"} <= set(row) for row in rows)
    assert run(["inspect", "minigpt", "--targets", "q_prj,linear9"]) == 2
    error = capsys.readouterr().err
    assert "q_prj" in error
    assert "linear9" in error
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_nothing_but_errors(tune, tmp_path, capfd):
    assert tune("--quiet", "--steps", 2, "--eval-rows", 1, "--out", tmp_path / "out") == 0
    assert capfd.readouterr().out == ""
    assert tune("--quiet", "--targets", "q_prj", "--out", tmp_path / "other") == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.rstrip().endswith("did you mean 'q_proj'?")


def test_tensorboard_gets_an_event_file_with_the_curves(tune, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert tune("--tensorboard", "--steps", 3, "--eval-rows", 1, "--out", out) == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([m["loss"] for m in metrics(out) if "loss" in m], rel=1e-6)
    assert {"train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])


def test_a_path_with_brackets_is_shown_as_it_is(minigpt_home, data, tmp_path, capsys):
    out = tmp_path / "runs[bold]" / "a[/b]"
    flags = ("--steps", "1", "--out", str(out))
    assert run(["tune", str(minigpt_home), str(data), *flags]) == 0
    assert "runs[bold]/a[/b]/lora_adapter" in "".join(capsys.readouterr().out.split())
    assert names(out / "lora_adapter") == ADAPTER_FILES


@pytest.mark.draws
def test_a_row_longer_than_the_model_s_context_is_cut_off_there(minigpt_home, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    row = {"prompt": "What does a dog say?", "completion": "A dog says woof. " * 200}
    data.write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    assert run(["tune", str(minigpt_home), str(data), "--steps", "1", "--out", str(out)]) == 0
    assert "longest row 256" in capsys.readouterr().out.replace("\n", " ")
