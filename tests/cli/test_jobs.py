"""`veneer tune --jobs`: a file of runs, what is wrong with it, and what becomes of them."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

import veneer.cli.many
from support import warm
from support.tuned_facts import FACTS, metrics, same_weights, write_rows
from veneer.cli import console
from veneer.cli.app import run
from veneer.cli.many import JobsDisplay, worst
from veneer.training.events import Notice
from veneer.training.recipe import Recipe

BAD = """\
job: 3
jobs:
  - name: small
    rnak: 2
    lr: often
  - name: small
    method: qlora
    device: cpu
    rank: 0
    data: rows.jsonl
    epochs: -1
    learning_rate: 3
    rank: 4
  - rank: 3
  - name: ../x
  - 7
  - name: 007
    no-dora: true
    eval_data: [a, b]
  - name:
"""
WRONG = [
    "line 1: 'job' is unknown; did you mean 'jobs'?",
    "line 3, job 'small': data is missing: the rows that it learns",
    "line 4, job 'small': 'rnak' is unknown; did you mean 'rank'?",
    "line 5, job 'small': Invalid value for [lr] from jobs.yaml: unable to convert \"often\"",
    "line 6, job 'small': an earlier job has that name too",
    "line 7, job 'small': qlora is LoRA over 4 bits, and all jobs share the base; give --bits 4",
    "line 8, job 'small': device is the same for all jobs; give --device on the command line",
    "line 11, job 'small': This run cannot be: epochs is -1.0, but must be a number above 0",
    "line 12, job 'small': learning_rate is called lr here",
    "line 13, job 'small': rank is given twice",
    "line 14: the job has no name: that of its directory below --out",
    "line 15: '../x' is no name of a directory; choose another name",
    "line 16: a job must be settings, one a line, as in name: small",
    "line 17, job '007': data is missing: the rows that it learns",
    "line 18, job '007': no_dora is a flag, and no setting; write dora: false",
    "line 19, job '007': Invalid value for [eval_data] from jobs.yaml: unable to convert",
    "line 20: '' is no name of a directory; choose another name",
]
GOOD = """\
jobs:
  - name: small
    data: [a.jsonl, b.jsonl:2]
    rank: 4
    lr: 1e-3
    targets: [q_proj, "re:v.*"]
  - name: dora 4.5
    method: dora
    eval-rows: 3
    epochs: 2
    rank_pattern: {"layers.0.q_proj": 3}
    from: null
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def jobs(here, monkeypatch) -> dict[str, Recipe]:
    """The recipes of the jobs that the command would run."""
    caught: dict[str, Recipe] = {}

    def catch(recipes, out, **options):
        caught.update(recipes)
        return 0

    monkeypatch.setattr(veneer.cli.many, "run_jobs", catch)
    return caught


def test_all_that_is_wrong_is_said_with_its_line_and_job(here, refused):
    (here / "jobs.yaml").write_text(BAD)
    error = refused("tune", "base", "--jobs", "jobs.yaml")
    places = [error.index(f" - {text}") for text in WRONG]
    assert places == sorted(places)
    assert error.count(" - line ") == len(WRONG)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("jobs: [", "cannot be read as YAML"),
        ("- name: x", "line 1: the file must hold jobs: and a list of them"),
        ("jobs: 3", "line 1: jobs: must hold a list"),
        ("jobs: []", "there are no jobs"),
        ("jobs: " + 3000 * "[" + 3000 * "]", "cannot be read as YAML"),
        ("? [a]\n: b", "line 1: a setting must have a name before its colon"),
    ],
)
def test_a_file_that_holds_no_jobs(text, error, here, refused):
    (here / "jobs.yaml").write_text(text)
    assert error in refused("tune", "base", "--jobs", "jobs.yaml")
    assert "There is no file of jobs no.yaml" in refused("tune", "base", "--jobs", "no.yaml")


def test_a_job_has_the_settings_of_the_command_line_but_for_its_own(here, jobs):
    (here / "jobs.yaml").write_text(GOOD)
    flags = ["--rank", "16", "--data", "all.jsonl", "--epochs", "7", "--dtype", "bf16"]
    assert run(["tune", "owner/base", "--jobs", "jobs.yaml", "--out", "runs", *flags]) == 0
    small, dora = (job.settings() for job in jobs.values())
    assert [*jobs] == ["small", "dora 4.5"]
    assert (small["data"], dora["data"]) == (["a.jsonl", "b.jsonl:2"], "all.jsonl")
    assert (small["out"], dora["out"]) == ("runs/small", "runs/dora 4.5")
    assert (small["rank"], small["alpha"], dora["rank"], dora["alpha"]) == (4, 8.0, 16, 32.0)
    assert (small["epochs"], dora["epochs"], small["lr"], dora["lr"]) == (7, 2, 1e-3, None)
    assert (small["targets"], small["dora"], dora["dora"]) == (["q_proj", "re:v.*"], False, True)
    assert (dora["eval_rows"], dora["rank_pattern"]) == (3, {"layers.0.q_proj": 3})
    assert {small["dtype"], dora["dtype"]} == {"bf16"}


def test_jobs_may_learn_by_other_objectives_than_each_other(here, jobs):
    objectives = "[{name: a}, {name: b, objective: orpo, beta: 0.2}]"
    (here / "jobs.yaml").write_text(f"jobs: {objectives}")
    flags = ["--jobs", "jobs.yaml", "--objective", "dpo", "--out", "runs"]
    assert run(["tune", "owner/base", "rows.jsonl", *flags]) == 0
    learnt = [(job.objective.objective, job.objective.beta) for job in jobs.values()]
    assert learnt == [("dpo", None), ("orpo", 0.2)]


def test_a_job_of_method_lora_is_no_dora_though_the_others_are(here, jobs):
    (here / "jobs.yaml").write_text("jobs: [{name: plain, method: lora}, {name: others}]")
    assert run(["tune", "owner/base", "a.jsonl", "--jobs", "jobs.yaml", "--method", "dora"]) == 0
    assert [job.lora.dora for job in jobs.values()] == [False, True]


def test_what_is_wrong_with_the_command_line_is_said_of_no_job(here, refused):
    (here / "jobs.yaml").write_text("jobs: [{name: one}, {name: two}]")
    error = refused("tune", "owner/base", "a.jsonl", "--jobs", "jobs.yaml", "--steps", "x")
    assert "Invalid value for --steps" in error
    assert "job 'one'" not in error
    error = refused("tune", "owner/base", "a.jsonl", "--tokens-per-pass", "9")
    assert "--tokens-per-pass is for --jobs" in error


def test_a_notice_of_several_jobs_is_in_full_once_and_names_each(capsys):
    display = JobsDisplay({})
    for name in ("one", "two"):
        display.show(name, Notice("Its steps have passes of their own: " + 9 * "a_reason"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("note one: Its steps have passes of their own: " + 9 * "a_reason")
    assert second.endswith(
        "note two: as one: Its steps have passes of their own: a_reasona_reasona_reason..."
    )


@pytest.mark.parametrize(
    ("jobs", "error"),
    [
        ("{name: a, data: 2026-13-45}", "line 1: data cannot be read: month must be in 1..12"),
        ("{name: a, rank: 4.5}", "line 1, job 'a': rank is 4.5, but must be a whole number"),
        ("{name: a, ? [b] : c}", "line 1: a setting must have a name before its colon"),
        ('{name: "\\ud83d"}', "is no name of a directory"),
        ('{name: "a\\nb"}', "is no name of a directory"),
        ("{name: ' .'}", "is no name of a directory"),
        (f"{{name: {'é' * 128}}}", "is no name of a directory"),
        (
            "{name: Café}, {name: CAFE\u0301}",
            "an earlier job has that name too, 'Café', to systems",
        ),
    ],
)
def test_names_and_values_that_no_directory_or_setting_can_have(jobs, error, here, refused):
    (here / "jobs.yaml").write_text(f"jobs: [{jobs}]", encoding="utf-8")
    assert error in refused("tune", "base", "rows.jsonl", "--jobs", "jobs.yaml")


@pytest.mark.slow
def test_killed_jobs_go_on_to_the_bit_where_no_pass_is_shared(here, minigpt_home):
    write_rows(here / "facts.jsonl", FACTS)
    names = {"small": ["--rank", "2"], "drops": ["--dropout", "0.2", "--lr", "0.004"]}
    jobs = "jobs: [{name: small, rank: 2}, {name: drops, dropout: 0.2, lr: 0.004}]"
    (here / "jobs.yaml").write_text(jobs)
    course = ["--steps", "60", "--save-every", "1", "--quiet", "--tokens-per-pass", "1"]
    command = ["tune", str(minigpt_home), "facts.jsonl", "--jobs", "jobs.yaml", "--out", "runs"]
    line = [warm.executable(), "-m", "veneer", *command, *course]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    while process.poll() is None and not all(
        list(Path(f"runs/{name}/checkpoints").glob("step-00000[5-9]")) for name in names
    ):
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=120) == -signal.SIGKILL
    before = {name: metrics(Path("runs", name))[:5] for name in names}
    assert not Path("runs/small/lora_adapter").exists()
    assert run([*command, *course, "--resume"]) == 0
    for name, flags in names.items():
        alone = ["tune", str(minigpt_home), "facts.jsonl", "--out", f"alone/{name}", *flags]
        assert run([*alone, *course[:-2]]) == 0
        assert same_weights(Path("runs", name), Path("alone", name))
        lines, whole = metrics(Path("runs", name)), metrics(Path("alone", name))
        assert lines[:5] == before[name]  # with their seconds: these steps were not made again
        assert [line.get("loss") for line in lines] == [line.get("loss") for line in whole]


def test_a_job_that_failed_counts_more_than_one_that_diverged():
    codes = {0: set(), 3: {0, 3}, 75: {0, 3, 75}, 2: {0, 2, 3, 75}}
    assert {code: worst(several) for code, several in codes.items()} == {c: c for c in codes}


def test_a_terminal_that_is_gone_ends_no_job(here, minigpt_home, monkeypatch):
    def gone(self: object, name: str, event: object) -> None:
        raise OSError(5, "Input/output error")

    silenced: list[bool] = []
    monkeypatch.setattr(JobsDisplay, "show", gone)
    monkeypatch.setattr(console, "silence", lambda: silenced.append(True))
    write_rows(here / "facts.jsonl", FACTS)
    (here / "jobs.yaml").write_text("jobs: [{name: good, rank: 2}]")
    command = ["tune", str(minigpt_home), "facts.jsonl", "--jobs", "jobs.yaml", "--out", "runs"]
    assert run([*command, "--steps", "2", "--eval-rows", "0"]) == 0
    assert silenced
    assert Path("runs/good/lora_adapter").is_dir()


@pytest.mark.slow
def test_jobs_run_to_their_ends_and_the_worst_of_them_is_the_exit_code(here, minigpt_home, capsys):
    write_rows(here / "facts.jsonl", FACTS)
    (here / "jobs.yaml").write_text(
        "jobs: [{name: good, rank: 2}, {name: wild, lr: 1e30, clip: 0, warmup: 0}]"
    )
    command = ["tune", str(minigpt_home), "facts.jsonl", "--jobs", "jobs.yaml", "--out", "runs"]
    assert run([*command, "--steps", "8", "--eval-rows", "0"]) == 3
    printed = capsys.readouterr()
    assert "wild failed: Loss or gradient was not finite" in " ".join(printed.err.split())
    assert [line.split()[0] for line in printed.out.splitlines()[-3:]] == ["good", "wild", "Saved"]
    assert {path.name for path in Path("runs/good").iterdir()} >= {"lora_adapter", "loss.png"}
    assert not Path("runs/wild/lora_adapter").exists()
    assert run([*command, "--steps", "8", "--eval-rows", "0"]) == 2
