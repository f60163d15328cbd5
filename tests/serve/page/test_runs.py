"""What the page shows of training runs and adapters: from their files, read as they grow."""

import json
import math
import os
import time

import pytest

import veneer
from support.random_adapters import shake, tokenizer
from support.server import call, running, scripted
from support.tiny_models import tiny
from veneer.formats.training import ComputedIn
from veneer.run_directory import METRICS, RunDirectory
from veneer.serve.page import runs as runs_module
from veneer.serve.page.about import about
from veneer.serve.page.curve import MOST_POINTS, Curve
from veneer.serve.page.runs import Runs

HERE = ComputedIn("float32")


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3])
def test_a_curve_stays_small_and_keeps_the_mean(count):
    curve = Curve()
    for i in range(count):
        curve.add(i + 1, float(i))
    shown = curve.shown()
    assert len(shown) <= MOST_POINTS + 1
    assert [x for x, _ in shown] == sorted({x for x, _ in shown})
    if count:
        assert shown[-1][0] == count
        assert math.isclose(shown[0][1], (shown[0][0] - 1) / 2)  # the mean of 0 to x - 1
    if count <= MOST_POINTS:
        assert shown == [(i + 1, float(i)) for i in range(count)]


def write(directory, steps, *, start=1, seconds=0.5):
    with (directory / METRICS).open("a") as file:
        for step in range(start, start + steps):
            line = {"step": step, "loss": 1.0 / step, "tokens": 100, "seconds": seconds}
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "runs" / "deep" / "one"
    directory.mkdir(parents=True)
    return directory


def only_run(runs):
    (run,) = runs.shown()
    return run


def test_only_what_is_new_is_read(directory, tmp_path):
    runs = Runs(tmp_path / "runs")
    assert runs.shown() == []
    write(directory, 3)
    RunDirectory(directory).progress.write_text('{"steps": 10, "ended": null}')
    RunDirectory(directory).recipe.write_text("model: tiny\ndata: rows.jsonl\nrank: 4\nseed: 1\n")
    run = only_run(runs)
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("deep/one", "running", 3, 10)
    assert run["tokens_per_second"] == 200
    assert run["seconds_left"] == 3.5
    assert run["settings"] == {"model": "tiny", "data": "rows.jsonl", "rank": 4}
    # A line that is being written waits for its end.
    with (directory / METRICS).open("a") as file:
        file.write('{"step": 4, "loss": ')
        file.flush()
        assert only_run(runs)["step"] == 3
        file.write('0.25, "tokens": 100, "seconds": 0.5}\n{"step": 4, "eval_loss": 0.7}\n')
    run = only_run(runs)
    assert [step for step, _ in run["curve"]] == [1, 2, 3, 4]
    assert run["evaluations"] == [(4, 0.7)]
    # A run that is resumed has its file written anew.
    (directory / METRICS).unlink()
    write(directory, 2)
    assert [step for step, _ in only_run(runs)["curve"]] == [1, 2]


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        ("finished", "finished"),
        ("diverged", "diverged"),
        ("patience", "finished"),
        ("interrupted", "stopped"),
    ],
)
def test_how_a_run_ended(directory, tmp_path, ended, state):
    write(directory, 2)
    RunDirectory(directory).write_progress(steps=10, ended=ended, verdict="It did.")
    run = only_run(Runs(tmp_path / "runs"))
    assert (run["state"], run["seconds_left"]) == (state, None)
    assert (run["verdict"], run["why"]) == ("It did.", None)


def test_speed_is_that_of_the_run_that_was_disturbed_least(directory, tmp_path):
    runs = Runs(tmp_path / "runs")
    assert runs.speed("tiny") is None
    for name, model, seconds in (("b", "tiny", 2.0), ("c", "other", 0.1), ("one", "tiny", 0.5)):
        place = directory.with_name(name)
        place.mkdir(exist_ok=True)
        write(place, 2, seconds=seconds)
        RunDirectory(place).recipe.write_text(f"model: {model}\n")
    os.utime(directory.with_name("b") / METRICS)  # the newest is another
    assert runs.speed("tiny") == 200


def test_a_failed_run_says_why(directory, tmp_path):
    write(directory, 0)  # it failed in its first steps
    RunDirectory(directory).write_progress(steps=10, ended="failed", why="no finite loss")
    run = only_run(Runs(tmp_path / "runs"))
    assert (run["state"], run["why"], run["seconds_left"]) == ("failed", "no finite loss", None)
    RunDirectory(directory).write_progress(steps=10)
    run = only_run(Runs(tmp_path / "runs"))
    assert (run["state"], run["why"]) == ("running", None)
    with running(scripted(), runs=tmp_path / "runs") as server:
        RunDirectory(directory).write_progress(steps=10, ended="failed", why="a <b> in it")
        assert call(server.url, "/api/runs")[2]["runs"][0]["why"] == "a <b> in it"


def test_a_run_that_died_has_stopped_after_a_while(directory, tmp_path):
    write(directory, 2)
    runs = Runs(tmp_path / "runs")
    assert only_run(runs)["state"] == "running"
    long_ago = time.time() - 10 * runs_module.QUIET_SECONDS
    os.utime(directory / METRICS, (long_ago, long_ago))
    assert only_run(runs)["state"] == "stopped"


def test_a_long_file_is_read_in_pieces(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "PIECE", 150)
    write(directory, 7)
    with (directory / METRICS).open("a") as file:
        file.write("[" * 400 + "\n")  # longer than a piece
        file.write('{"step": 8, "loss": 0.5, "reward": 0.25, "tokens": 1, "seconds": 1}\n{"st')
    run = only_run(Runs(tmp_path / "runs"))
    assert [step for step, _ in run["curve"]] == [*range(1, 9)]
    assert run["reward"] == 0.25
    followed = runs_module.follow_file(directory / METRICS)
    assert (followed.step, followed.loss) == (8, 0.5)


def test_what_is_no_run_of_ours_hides_no_other(directory, tmp_path):
    root = tmp_path / "runs"
    write(directory, 1)
    for name, text in (
        ("a", "[1]\n"),
        ("b", '{"loss": 1}\n'),
        ("c", "\x00\n"),
        ("d", '{"step": "x"}\n'),
        ("e", "[" * 100_000 + "\n"),
    ):
        (root / name).mkdir()
        (root / name / METRICS).write_text(text)
    RunDirectory(root / "d").recipe.write_text("- a list\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    write(outside, 5)
    (root / "link").symlink_to(outside)
    with (directory / METRICS).open("a") as file:
        file.write('{"step": 2, "loss": NaN, "tokens": 1, "seconds": 1}\n')
    runs = Runs(root)
    for _ in range(2):  # nor do they turn up at the second look
        assert only_run(runs)["name"] == "deep/one"
    with running(scripted(), runs=root) as server:
        assert call(server.url, "/api/runs")[2]["runs"][0]["curve"] == [[1, 1.0]]


def test_what_two_runs_differ_in(directory, tmp_path):
    root = tmp_path / "runs"
    other = root / "two"
    other.mkdir()
    for place, recipe in (
        (directory, "rank: 4\ntargets: all\nout: here\nlr: 0.1\n"),
        (other, "rank: 8\ntargets: [q_proj, v_proj]\nout: there\nlr: 0.1\ndora: true\n"),
    ):
        write(place, 1)
        RunDirectory(place).recipe.write_text(recipe)
    names = ["deep/one", "two"]
    assert Runs(root).differences(names) == [
        {"setting": "rank", "values": ["4", "8"]},
        {"setting": "targets", "values": ["all", "q_proj, v_proj"]},
        {"setting": "dora", "values": [None, "true"]},
    ]
    with running(scripted(), runs=root) as server:
        ask = "/api/runs/differences?run=two&run="
        assert len(call(server.url, f"{ask}deep%2Fone")[2]["differences"]) == 3
        for name in ("no", "..", "..%2F..%2Foutside", ""):
            assert call(server.url, f"{ask}{name}")[0] == 404
        assert call(server.url, "/api/runs/differences?run=two")[0] == 400


def test_a_real_run_shows_its_steps_and_its_end(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} is", "completion": f" {i}."}) + "\n" for i in range(9))
    )
    home = tmp_path / "home"
    veneer.write_model(tiny("llama"), tokenizer(), home)
    recipe = veneer.Recipe(
        model=str(home),
        data=tmp_path / "rows.jsonl",
        training=veneer.TrainConfig(steps=3, eval_every=2),
        rows=veneer.DataConfig(eval_rows=2),
        out=tmp_path / "runs" / "real",
    )
    runs, seen = Runs(tmp_path / "runs"), []
    (tmp_path / "runs").mkdir()
    for _ in veneer.tune(recipe):
        seen += [(run["step"], run["steps"], run["state"]) for run in runs.shown()]
    assert (1, 3, "running") in seen
    assert seen[-1] == (3, 3, "finished")
    assert only_run(runs)["verdict"].startswith("Learnt: held-out loss")
    shown = about(recipe.adapter, 1, HERE)
    assert (shown["rank"], shown["alpha"]) == (8, 16.0)
    assert shown["trained"]["data"] == str(tmp_path / "rows.jsonl")
    assert shown["trained"]["steps"] == 3
    lines = RunDirectory(recipe.out).read_metrics()
    assert shown["eval_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert [step for step, _ in shown["curve"]] == [1, 2, 3]


def test_adapters_of_both_formats(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=3, alpha=6, targets="mlp", dora=True))
    for format in ("native", "peft"):
        directory = tmp_path / format
        veneer.save(shake(model), directory, format=format)
        shown = about(directory, 1, HERE)
        assert (shown["rank"], shown["alpha"], shown["dora"]) == (3, 6, True)
        assert (
            shown["targets"] == ["down_proj", "gate_proj", "up_proj"] or "mlp" in shown["targets"]
        )
        assert shown["bytes"] == sum(file.stat().st_size for file in directory.iterdir())
        assert "trained" not in shown
        assert "invocation" not in shown
    lora = veneer.LoRA(rank=2, targets="attention", invocation=(5, 6))
    for format in ("native", "peft"):
        directory = tmp_path / f"activated-{format}"
        veneer.save(veneer.attach(tiny("llama"), lora), directory, format=format)
        assert about(directory, 1, HERE)["invocation"] == [5, 6]
    (tmp_path / "native" / "lora_config.json").write_text("{")
    assert "cannot be read" in about(tmp_path / "native", 2, HERE)["error"]
