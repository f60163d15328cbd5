"""`veneer compare` on a MiniGPT: equal budgets, honest rows, and jobs that are done once."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import warm
from support.comparison_jobs import ROWS, write_rows
from veneer.cli.app import run
from veneer.compare import run as comparing
from veneer.compare.job import Result

QUICK = ("--budget", "steps:4", "--tokens-per-step", "256", "--max-new-tokens", "8")
TRAINED = ("lora", "prefix", "full")


@pytest.fixture(scope="module")
def done(minigpt_home, tmp_path_factory):
    """A comparison of three methods, in which one run of a second table fails."""
    home = tmp_path_factory.mktemp("compared")
    # One of them fills the context, of which virtual tokens take a part.
    long = " ".join([ROWS[0][1]] * 100)
    data = write_rows(home / "rows.jsonl", [*ROWS, (ROWS[0][0], long)])
    base = shutil.copytree(minigpt_home, home / "base")  # one test changes its files
    test = write_rows(home / "test.jsonl", ROWS[:6])
    arguments = ["compare", str(base), str(data), "--test", str(test), *QUICK]
    arguments += ["--methods", ",".join(TRAINED), "--target-sets", "all,nowhere"]
    arguments += ["--out", str(home / "out")]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "executable", warm.executable())
        code = run(arguments)
    numbers = json.loads((home / "out" / "comparison.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        arguments=arguments,
        out=home / "out",
        code=code,
        printed=out.getvalue(),
        complained=err.getvalue(),
        numbers=numbers,
        runs={name: by_seed["0"] for name, by_seed in numbers["runs"].items()},
        rows={row["label"]["name"]: row for row in numbers["rows"]},
    )


def test_every_method_gets_the_same_tokens_in_the_same_order(done):
    assert set(done.runs) == set(TRAINED)
    assert len({run["tokens"] for run in done.runs.values()}) == 1
    assert all(0 < run["tokens"] <= 4 * 256 for run in done.runs.values())
    # Before their first step two of them are the base, so that equal losses mean equal rows.
    assert done.runs["lora"]["losses"][0] == pytest.approx(done.runs["full"]["losses"][0], rel=1e-5)
    assert all(len(run["losses"]) == 4 for run in done.runs.values())
    chosen = json.loads((done.out / "runs" / "base.json").read_text(encoding="utf-8"))["result"]
    assert (chosen["hidden_size"], chosen["tokens_per_step"]) == (64, 256)
    assert chosen["steps"] > 4


def test_rows_say_what_was_measured(done):
    rows = done.rows
    assert list(rows) == ["base", *TRAINED]
    assert [rows[name]["base_unchanged"] for name in rows] == [None, True, True, False]
    assert [rows[name]["swappable"] for name in rows] == [None, True, True, False]
    assert rows["full"]["share"] == 1.0
    assert rows["lora"]["trained"] < rows["full"]["trained"]
    assert rows["lora"]["kept"] < rows["full"]["kept"]
    for name in TRAINED:
        assert rows[name]["eval_loss"]["mean"] != rows["base"]["eval_loss"]["mean"]
        assert rows[name]["forgotten"]["mean"] != 0
        assert 0 <= rows[name]["quality"]["mean"] <= 100
        assert rows[name]["eval_loss"]["deviation"] is None
        assert rows[name]["peak"] > 50e6  # Python with torch
        assert rows[name]["tokens_per_second"] > 0
    # Four bytes a weight, and little around them.
    full = rows["full"]
    assert 4 * full["trained"] < full["kept"] < 4.2 * full["trained"]


def test_a_run_that_fails_is_a_row_and_the_others_go_on(done):
    assert done.code == 1
    good, bad = done.numbers["swept"]
    assert good["label"]["name"] == "rank 8, all"
    assert good["eval_loss"] == done.rows["lora"]["eval_loss"]
    assert bad["seeds"] == []
    assert "'nowhere'" in bad["errors"][0]
    assert "nowhere" in done.complained
    assert "Traceback" not in done.complained
    table = (done.out / "comparison.md").read_text(encoding="utf-8")
    assert "| rank 8, nowhere | failed |" in table
    assert "Failed: rank-8-nowhere-seed0: " in table


def test_what_is_left_is_for_people_and_for_programs(done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {"comparison.md", "comparison.json", "comparison.png", "runs"}
    assert (done.out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    files = {"base.json", "about.txt", *(f"{name}-seed0.json" for name in TRAINED)}
    assert {path.name for path in (done.out / "runs").iterdir()} == files
    table = (done.out / "comparison.md").read_text(encoding="utf-8")
    for name in ("base", *TRAINED):
        assert f"\n| {name} | " in table
        assert f"\n- **{name}**: " in table
    tokens = done.runs["lora"]["tokens"]
    assert "4 steps for each" in table
    assert f"({tokens:,} in all)" in table
    assert "exact match over 6 questions of test.jsonl" in table
    for line in ("base done: evaluation loss", "lora-seed0 done", "full-seed0 done"):
        assert line in done.printed


@pytest.fixture
def asked_for(monkeypatch):
    """Let no process start: note the jobs that would be done, and let each find the same."""
    jobs = []

    def do_job(job, runs):
        jobs.append(job)
        yield from ()
        return Result({}, 10, "float32", 5, 2, 100.0, eval_loss=abs(job.lr - 2e-3), trained=3)

    monkeypatch.setattr(comparing, "do_job", do_job)
    return jobs


def test_resuming_does_only_what_did_not_end(done, asked_for, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in (done.out / "runs").iterdir()}

    def fails(job, runs):
        asked_for.append(job)
        yield from ()
        return "no luck"

    monkeypatch.setattr(comparing, "do_job", fails)
    assert run([*done.arguments, "--resume", "--quiet"]) == 1
    assert [job.name for job in asked_for] == ["rank-8-nowhere-seed0"]
    assert "no luck" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (done.out / "runs").iterdir()} == before


def test_resuming_with_other_settings_or_other_data_is_refused(done, asked_for, capsys):
    assert run([*done.arguments, "--resume", "--limit", "50"]) == 2
    assert "limit (all there, 50 here)" in capsys.readouterr().err
    data = Path(done.arguments[2])
    before = data.read_text(encoding="utf-8")
    try:
        write_rows(data, ROWS[1:])
        assert run([*done.arguments, "--resume"]) == 2
    finally:
        data.write_text(before, encoding="utf-8")
    assert "files (" in capsys.readouterr().err
    assert run(done.arguments) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in (str(done.out), "--resume", "--force", "--out"))
    assert asked_for == []


def test_what_is_not_ours_is_never_removed(asked_for, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    theirs = tmp_path / "out" / "runs" / "events.tfevents"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("curves")
    flags = ["compare", "m", str(data), "--out", str(tmp_path / "out"), "--methods", "lora"]
    for switch in ([], ["--force"], ["--resume"]):
        assert run([*flags, *switch]) == 2
        assert "holds other things" in capsys.readouterr().err
    assert theirs.read_text() == "curves"
    assert asked_for == []


def test_earlier_runs_are_removed_only_for_those_that_begin(done, monkeypatch, capsys):
    def fails(job, runs):
        yield from ()
        return "there is no such base"

    before = {path: path.read_bytes() for path in (done.out / "runs").iterdir()}
    monkeypatch.setattr(comparing, "do_job", fails)
    assert run([*done.arguments, "--force"]) == 2
    assert "no such base" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (done.out / "runs").iterdir()} == before
    names = {path.name for path in done.out.iterdir()}
    assert names == {"comparison.md", "comparison.json", "comparison.png", "runs"}


def test_a_base_that_changed_is_refused(done, asked_for, capsys):
    weights = Path(done.arguments[1]) / "model.pt"
    before = weights.stat()
    try:
        os.utime(weights, (before.st_atime, before.st_mtime + 1))
        assert run([*done.arguments, "--resume"]) == 2
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "files (" in capsys.readouterr().err
    assert asked_for == []


def compared(tmp_path, *flags: str) -> dict:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(["compare", "m", str(data), "--out", "out", "--quiet", "--methods", *flags]) == 0
    return json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))


def test_a_budget_of_tokens_is_the_same_steps_for_all(asked_for, tmp_path):
    compared(tmp_path, "lora,full", "--budget", "tokens:1250", "--seeds", "2", "--seed", "3")
    assert [(job.name, job.steps) for job in asked_for[1:]] == [
        ("lora-seed3", 12),
        ("full-seed3", 12),
        ("lora-seed4", 12),
        ("full-seed4", 12),
    ]
    assert {job.split_seed for job in asked_for} == {3}
    assert {job.dtype for job in asked_for[1:]} == {"float32"}


def test_without_a_budget_all_get_what_tune_would_choose(asked_for, tmp_path, monkeypatch):
    def do_job(job, runs):
        asked_for.append(job)
        yield from ()
        chosen = {"hidden_size": 576, "tokens_per_step": 224, "steps": 37}
        return Result({}, 10, "float32", 5, 2, 100.0, 1.0, trained=3, **chosen)

    monkeypatch.setattr(comparing, "do_job", do_job)
    compared(tmp_path, "lora,lora+,full")
    assert [(job.tokens_per_step, job.steps, job.lr) for job in asked_for[1:]] == [
        (224, 37, 1.3e-3),
        (224, 37, 3.3e-4),
        (224, 37, 1.3e-4),
    ]
    assert asked_for[0].tokens_per_step is None
    assert "37 steps for each" in Path("out/comparison.md").read_text(encoding="utf-8")


def test_a_range_test_takes_the_rate_with_the_lowest_loss(asked_for, tmp_path):
    numbers = compared(
        tmp_path, "lora", "--range-test", "--budget", "steps:50", "--lr.lora", "6e-3"
    )
    assert [(job.kind, job.steps, job.lr) for job in asked_for[1:]] == [
        ("trial", 5, 2e-3),
        ("trial", 5, 6e-3),
        ("trial", 5, 1.8e-2),
        ("run", 50, 2e-3),
    ]
    assert numbers["rows"][1]["lr"] == 2e-3
    assert numbers["trials"]["lora"]["0.002"] == 0.0


def test_a_rate_that_diverges_is_an_answer_and_a_trial_that_fails_is_none(tmp_path, monkeypatch):
    def do_job(job, runs):
        yield from ()
        if job.kind == "trial" and job.label.name == "lora+":
            return "its process was killed"
        loss = math.inf if job.kind == "trial" and job.lr > 1e-2 else job.lr
        return Result({}, 10, "float32", 5, 2, 100.0, eval_loss=loss, trained=3)

    monkeypatch.setattr(comparing, "do_job", do_job)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--range-test", "--methods", "lora,lora+", "--lr.lora", "6e-3", "--out", "out"]
    assert run(["compare", "m", str(data), *flags, "--quiet"]) == 1
    numbers = json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))
    assert numbers["trials"]["lora"] == {"0.002": 2e-3, "0.006": 6e-3, "0.018": None}
    table = Path("out/comparison.md").read_text(encoding="utf-8")
    assert "0.018: diverged" in table
    assert "| lora+ | failed |" in table
    assert "was killed" in table


def test_minutes_become_steps_by_each_methods_own_speed(asked_for, tmp_path, monkeypatch):
    def do_job(job, runs):
        asked_for.append(job)
        yield from ()
        seconds = 0.5 if job.label.name == "lora" else 1.5
        return Result({}, 10, "float32", 5, 2, 100.0, 1.0, trained=3, seconds_a_step=seconds)

    monkeypatch.setattr(comparing, "do_job", do_job)
    compared(tmp_path, "lora,lora+", "--budget", "minutes:1", "--lr.lora+", "1e-4")
    runs = [(job.name, job.steps, job.lr) for job in asked_for if job.kind == "run"]
    assert runs == [("lora-seed0", 120, 5e-4), ("lora+-seed0", 40, 1e-4)]


def test_faults_of_all_files_are_named_at_once_before_anything_starts(asked_for, tmp_path, capsys):
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "a"}\n')
    flags = ("--test", str(test), "--general", "nowhere.txt")
    assert run(["compare", "m", "neither.jsonl", *flags]) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in ("neither.jsonl", "test.jsonl:1", "nowhere.txt"))
    assert asked_for == []


def test_a_base_that_cannot_be_compared_ends_it(tmp_path, monkeypatch, capsys):
    def do_job(job, runs):
        yield from ()
        return "there is no such base"

    monkeypatch.setattr(comparing, "do_job", do_job)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(["compare", "m", str(data)]) == 2
    assert capsys.readouterr().err == "Error: there is no such base\n"


def test_deviations_over_seeds_are_shown(asked_for, tmp_path, monkeypatch):
    def do_job(job, runs):
        asked_for.append(job)
        yield from ()
        return Result({}, 10, "float32", 5, 2, 100.0, eval_loss=1.0 + job.seed, trained=3)

    monkeypatch.setattr(comparing, "do_job", do_job)
    numbers = compared(tmp_path, "lora", "--seeds", "3")
    assert numbers["rows"][1]["eval_loss"] == {"mean": 2.0, "deviation": 1.0}
    assert "| 2.0000 ± 1.0000 |" in Path("out/comparison.md").read_text(encoding="utf-8")
