"""`veneer compare` on a MiniGPT: equal budgets, honest rows, and jobs that are done once."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib import pyplot
from matplotlib.transforms import Bbox
from rich.console import Console

import veneer
from support.comparison_jobs import job
from veneer.cli import compare as showing
from veneer.cli.app import run
from veneer.compare import run as comparing
from veneer.compare.events import JobDone, JobFailed, JobStep, Laid
from veneer.compare.job import Result
from veneer.compare.labels import LABELS
from veneer.compare.picture import extents, name_points
from veneer.compare.process import why
from veneer.compare.worker import GENERAL, base_digests
from veneer.data.sources import read_rows
from veneer.data.world import facts

QUICK = ("--budget", "steps:4", "--tokens-per-step", "256", "--max-new-tokens", "8")
ROWS = [(question, fact.answer) for fact in facts()[::5] for question in fact.questions]
TRAINED = ("lora", "prefix", "full")


def write_rows(path: Path, pairs) -> Path:
    rows = [json.dumps({"prompt": asked, "completion": said}) for asked, said in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(minigpt_home, tmp_path_factory):
    """A comparison of three methods, in which one run of a second table fails."""
    home = tmp_path_factory.mktemp("compared")
    # One of them fills the context, of which virtual tokens take a part.
    long = " ".join([ROWS[0][1]] * 100)
    data = write_rows(home / "rows.jsonl", [*ROWS, (ROWS[0][0], long)])
    test = write_rows(home / "test.jsonl", ROWS[:6])
    arguments = ["compare", str(minigpt_home), str(data), "--test", str(test), *QUICK]
    arguments += ["--methods", ",".join(TRAINED), "--target-sets", "all,nowhere"]
    arguments += ["--out", str(home / "out")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
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
    kept = {f"{name}-seed0.json" for name in TRAINED}
    beside = {"base.json", "about.txt"}
    assert {path.name for path in (done.out / "runs").iterdir()} == kept | beside
    table = (done.out / "comparison.md").read_text(encoding="utf-8")
    for name in ("base", *TRAINED):
        assert f"\n| {name} | " in table
        assert f"\n- **{name}**: " in table
    tokens = done.runs["lora"]["tokens"]
    assert "4 steps for each" in table
    assert f"({tokens:,} in all)" in table
    assert "exact match over 6 questions of test.jsonl" in table
    for said in ("base done: evaluation loss", "lora-seed0 done", "full-seed0 done"):
        assert said in done.printed


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
    assert "limit (None there, 50 here)" in capsys.readouterr().err
    data = Path(done.arguments[2])
    before = data.read_text(encoding="utf-8")
    try:
        write_rows(data, ROWS[1:])
        assert run([*done.arguments, "--resume"]) == 2
    finally:
        data.write_text(before, encoding="utf-8")
    assert "files (" in capsys.readouterr().err
    assert run(done.arguments) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in (str(done.out), "--resume", "--force", "--out"))
    assert asked_for == []


def test_what_is_not_ours_is_never_put_away(asked_for, tmp_path, capsys):
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


def test_earlier_runs_are_put_away_only_for_those_that_begin(done, monkeypatch, capsys):
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


def test_a_range_test_takes_the_rate_with_the_lowest_loss(asked_for, tmp_path):
    found = compared(tmp_path, "lora", "--range-test", "--budget", "steps:50", "--lr.lora", "6e-3")
    assert [(job.kind, job.steps, job.lr) for job in asked_for[1:]] == [
        ("trial", 5, 2e-3),
        ("trial", 5, 6e-3),
        ("trial", 5, 1.8e-2),
        ("run", 50, 2e-3),
    ]
    assert found["rows"][1]["lr"] == 2e-3
    assert found["trials"]["lora"]["0.002"] == 0.0


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
    found = json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))
    assert found["trials"]["lora"] == {"0.002": 2e-3, "0.006": 6e-3, "0.018": None}
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
    assert runs == [("lora-seed0", 120, 2e-3), ("lora+-seed0", 40, 1e-4)]


def test_faults_of_all_files_are_named_at_once_before_anything_starts(asked_for, tmp_path, capsys):
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "a"}\n')
    flags = ("--test", str(test), "--general", "nowhere.txt")
    assert run(["compare", "m", "neither.jsonl", *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("neither.jsonl", "test.jsonl:1", "nowhere.txt"))
    assert asked_for == []


def test_a_base_that_cannot_be_compared_ends_it(tmp_path, monkeypatch, capsys):
    def do_job(job, runs):
        yield from ()
        return "there is no such base"

    monkeypatch.setattr(comparing, "do_job", do_job)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(["compare", "m", str(data)]) == 2
    assert capsys.readouterr().err == "Error: there is no such base\n"


def test_the_hash_of_the_base_sees_one_changed_number_and_no_adapter(minigpt_home):
    base = veneer.load_base(minigpt_home)
    before = base_digests(base.model)
    veneer.attach(base.model, veneer.LoRA(targets="all"))
    assert base_digests(base.model) == before
    name, weight = next(iter(base.model.named_parameters()))
    weight.data.view(-1)[-1] += 1e-3
    changed = {n for n, mark in base_digests(base.model).items() if mark != before[n]}
    assert changed == {name}
    packed = veneer.load_base(minigpt_home, bits=4).model
    before = base_digests(packed)
    layer = next(m for m in packed.modules() if hasattr(m, "packed"))
    next(iter(layer.quantized_weight.tensors().values())).view(-1)[0] += 1
    assert len(before) > len(list(packed.parameters()))
    assert base_digests(packed) != before


def begun(minigpt_home: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """Return a comparison that has begun to train, and would not end soon."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--methods", "lora", "--budget", "steps:100000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer", "compare", str(minigpt_home), str(data), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Whoever runs the tests in the background may have them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "lora-seed0 ..." in line:
            break
    wait_until(lambda: workers(tmp_path))
    return process


def test_ctrl_c_ends_the_worker_and_says_how_to_go_on(minigpt_home, tmp_path):
    process = begun(minigpt_home, tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert {path.name for path in (tmp_path / "out" / "runs").glob("*.json")} == {"base.json"}
    assert not workers(tmp_path)


def test_a_worker_ends_with_whoever_asked_for_it(minigpt_home, tmp_path):
    process = begun(minigpt_home, tmp_path)
    process.kill()
    process.communicate(timeout=120)
    wait_until(lambda: not workers(tmp_path))


def workers(home: Path) -> list[bytes]:
    """Return the command lines of the processes that do jobs below `home`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(place.read_bytes())
    return [line for line in found if b"compare.worker" in line and str(home).encode() in line]


def wait_until(true: Callable[[], object]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("a minute was not enough")


def test_deviations_over_seeds_are_shown(asked_for, tmp_path, monkeypatch):
    def do_job(job, runs):
        asked_for.append(job)
        yield from ()
        return Result({}, 10, "float32", 5, 2, 100.0, eval_loss=1.0 + job.seed, trained=3)

    monkeypatch.setattr(comparing, "do_job", do_job)
    found = compared(tmp_path, "lora", "--seeds", "3")
    assert found["rows"][1]["eval_loss"] == {"mean": 2.0, "deviation": 1.0}
    assert "| 2.0000 ± 1.0000 |" in Path("out/comparison.md").read_text(encoding="utf-8")


def test_a_process_that_ends_without_a_word_is_explained(tmp_path):
    log = tmp_path / "lora.log"
    log.write_text("Traceback (most recent call last):\n  ...\nRuntimeError: no room\n\n")
    assert why(1, log) == f"RuntimeError: no room (all of it: {log})"
    assert "memory" in why(-signal.SIGKILL, log)
    assert "SIGSEGV" in why(-signal.SIGSEGV, log)


def test_on_a_terminal_one_table_shows_how_each_run_stands(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(showing, "OUTPUT", terminal)
    first, second, third = (job(name=n, label=LABELS[n], steps=9) for n in ("lora", "full", "dora"))
    result = Result({}, 10, "float32", 5, 2, 100.0, 1.25, exact=50.0)
    with showing.CompareDisplay() as display:
        display.show(Laid(("lora", "full", "dora", "prefix"), (0,)))
        display.show(JobDone(first, result, False))
        display.show(JobStep(second, 3, 2.5, 1234.0, 2_000_000_000))
        display.show(JobFailed(third, "no [luck]"))
        terminal.print(display._table())
    lines = [line for line in shown.getvalue().splitlines() if line.strip()]
    *_, lora = (line for line in lines if line.startswith("lora "))
    *_, full = (line for line in lines if line.startswith("full "))
    assert "seed 0: done" in lora
    assert "1.2500" in lora
    assert "50.0" in lora
    assert all(text in full for text in ("seed 0: step 3/9", "2.500", "1,234", "2.0 GB"))
    assert any(line.startswith("dora ") and "failed" in line for line in lines)
    assert any(line.startswith("prefix ") and "waiting" in line for line in lines)


def test_the_names_in_the_picture_cover_neither_points_nor_each_other():
    figure, axes = pyplot.subplots(figsize=(5, 4))
    places = [(1.0, 1.0)] * 4 + [(1.01, 1.0), (1.0, 1.02), (3.0, 4.0)]
    for x, y in places:
        axes.plot(x, y, "o")
    axes.margins(0.2)
    figure.draw_without_rendering()
    name_points([(axes, x, y, f"name {i}") for i, (x, y) in enumerate(places)], axes, figure)
    boxes = [Bbox.from_extents(extents(t, figure.canvas.get_renderer())) for t in axes.texts]
    assert len(boxes) == len(places)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*axes.transData.transform(place)) for place in places)
    pyplot.close(figure)


def test_the_sample_of_general_english_ships():
    rows, problems = read_rows(GENERAL)
    assert not problems
    assert len(rows) == 60
    assert 2000 < sum(len(row.row.text.split()) for row in rows) < 3000
