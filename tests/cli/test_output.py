"""What commands print: in a terminal of 80 columns, in a log, and as JSON for programs."""

import io
import json
import re

import pytest
from rich.console import Console

from support.screen import Screen
from support.tuned_facts import metrics
from veneer.cli import console, plan_tables
from veneer.cli.console import PAUSE, Pace, Terminal
from veneer.cli.events import events_on_stdout
from veneer.plan.config import PlanConfig


def test_a_line_is_due_once_a_minute_and_where_it_must_be():
    now = 0.0
    pace = Pace(lambda: now)
    due = []
    for second in range(200):
        now = float(second)
        if pace.due(anyway=second == 30):
            due.append(second)
    assert due == [30, 30 + PAUSE, 30 + 2 * PAUSE]


@pytest.mark.parametrize(
    ("environment", "screen", "animates"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False, False),  # a log that shows colours
    ],
)
def test_only_a_terminal_that_can_is_drawn_over(environment, screen, animates):
    terminal = Terminal(file=Screen() if screen else io.StringIO(), _environ=environment)
    assert terminal.animates == animates


def printed_on(file: io.StringIO, text: str, **options: object) -> list[str]:
    terminal = Terminal(file=file, width=80, _environ={"TERM": "xterm"}, color_system=None)
    terminal.print(text, **options)
    return file.getvalue().splitlines()


def test_lines_break_between_words_in_a_terminal_and_stay_whole_in_a_file():
    text = "[bold]word[/] " + "word " * 38 + "word"
    for file, lines in ((io.StringIO(), 1), (Screen(), 3)):
        printed = printed_on(file, text)
        assert len(printed) == lines
        assert all(len(line) <= 80 or lines == 1 for line in printed)
        assert " ".join(printed).split() == ["word"] * 40


def test_paths_and_commands_are_whole_in_a_terminal_too():
    path = "/a/long/way/" * 10
    assert printed_on(Screen(), f"Saved   adapter: {path} (1 kB)") == [
        "Saved   adapter:",
        path,
        "(1 kB)",
    ]
    command = f"veneer tune model {path} --out {path}"
    assert printed_on(Screen(), command, soft_wrap=True) == [command]
    assert printed_on(Screen(), "You: ", end="") == ["You: "]


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (200, 1)])
def test_a_table_that_is_too_wide_is_several_with_no_number_broken(width, tables, monkeypatch):
    screen = Terminal(file=Screen(), width=width, _environ={"TERM": "xterm"}, color_system=None)
    monkeypatch.setattr(console, "OUTPUT", screen)
    titles = [f"number {column}" for column in range(10)]
    table = console.new_table("Name", *titles, "", title="What it is")
    for row in "ab":
        table.add_row(f"row {row}", *(f"{row}{column},123,456" for column in range(10)), "")
    console.print_wide(table)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    printed = screen.file.getvalue()
    for column in range(10):
        assert printed.count(f"number {column}") == printed.count(f"b{column},123,456") == 1
    assert [printed.count(text) for text in ("Name", "row a")] == [tables, tables]
    assert printed.count("What it is") == 1


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("model", ["smollm2-135m", "qwen3-30b-a3b"])
@pytest.mark.thinned
def test_a_plan_fits_into_a_terminal(model, width, monkeypatch, capsys):
    screen = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(plan_tables, "page", lambda wide: screen)
    plan_tables.show_plan(model, plan_tables.LoRA(), PlanConfig(), formulas=False)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for name in ("q_proj", "prompt", "freeze, last 2"):  # not broken
        assert any(re.search(rf"\b{name}\s", line) for line in lines), name
    assert any("Each" in line for line in lines) == (width == 100)


def test_in_a_log_a_run_has_few_lines_and_none_is_drawn_over(tune, tmp_path, capsys):
    assert tune("--out", tmp_path / "out", "--steps", 30) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"step (\d+)/30", printed) == ["1", "30"]
    assert "\x1b" not in printed
    assert "\r" not in printed


def test_as_json_every_line_is_an_event_and_the_words_are_elsewhere(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 3, "--eval-rows", 1, "--json") == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    names = [event["event"] for event in events]
    for name in ("data_ready", "planned", "model_ready", "started", "evaluated", "verdict"):
        assert name in names, name
    steps = [event for event in events if event["event"] == "step"]
    assert [step["loss"] for step in steps] == [m["loss"] for m in metrics(out) if "loss" in m]
    written = [event["place"] for event in events if event["event"] == "written"]
    assert str(out / "lora_adapter") in written
    assert "Verdict" in printed.err
    assert console.OUTPUT.stderr is False


def test_as_json_a_wide_table_is_among_the_words(capsys):
    table = console.new_table("job", "steps")
    table.add_row("small", "3/3")
    with events_on_stdout(True):
        console.print_wide(table)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "small" in printed.err


def test_json_has_no_number_that_json_lacks():
    from veneer.errors import TrainingError
    from veneer.training.event_json import event_json
    from veneer.training.events import Failed, Step
    from veneer.training.search.result import Cost, Searched, SearchResult, TrialResult

    step = Step(3, float("nan"), 0.1, 4, 2, 0.5, 10, {"margin": float("inf")})
    said = event_json(step)
    assert (said["event"], said["loss"], said["metrics"]) == ("step", None, {"margin": None})
    assert event_json(Failed(TrainingError("why"))) == {"event": "failed", "error": "why"}
    trial = TrialResult(1, {"lr": 1e-3, "targets": ["q_proj"]}, "failed", {50: float("nan")})
    searched = event_json(Searched(SearchResult("m", "d", [trial], Cost(1.0, 2, 3, None))))
    (shown,) = json.loads(json.dumps(searched))["result"]["trials"]
    assert (shown["values"]["targets"], shown["losses"]) == (["q_proj"], {"50": None})


def test_as_json_and_quiet_there_are_no_words(tune, tmp_path, capsys):
    assert tune("--out", tmp_path / "out", "--steps", 1, "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(line.startswith("{") for line in printed.out.splitlines())
