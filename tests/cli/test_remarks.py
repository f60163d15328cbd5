"""What a run says of settings that are legal but hardly meant, and of its own course."""

from veneer.cli.progress import RunDisplay
from veneer.data.columns import summarize
from veneer.errors import share_text
from veneer.training.events import DataReady, Measured, Started, Step, Trained


def test_ranks_that_no_layer_can_have_are_remarked(shown, minigpt_home, data, tmp_path):
    flags = ("--rank", 200, "--targets", "all")
    commands = (
        ("inspect", minigpt_home),
        ("plan", minigpt_home),
        ("tune", minigpt_home, data, "--steps", 1, "--out", tmp_path / "out"),
    )
    for command in commands:
        printed = " ".join(shown(*command, *flags).split())
        assert "rank 200 over" in printed, command
        assert "at most rank 64" in printed
        assert "More parameters train than the base has (" in printed
    for command in commands[:2]:
        printed = shown(*command, "--rank", 8, "--targets", "all")
        assert "at most rank" not in printed
        assert "More parameters" not in printed


def test_new_words_that_are_not_there_are_missed(tune, tmp_path, capsys):
    assert tune("--new-words", "auto", "--steps", 1, "--out", tmp_path / "out") == 0
    assert "--new-words auto adds no token: no word occurs" in capsys.readouterr().out


def test_a_resumed_run_counts_its_own_steps(capsys):
    display = RunDisplay()
    display.show(Started(40, 27))
    display.show(Trained(40, 40))
    assert "Trained 13 steps (27 before) in" in capsys.readouterr().out
    display = RunDisplay()
    display.show(Started(40, 0))
    display.show(Trained(40, 40))
    assert "Trained 40 steps in" in capsys.readouterr().out


def test_in_a_file_the_first_row_has_its_own_lines(capsys):
    words = "You are a helpful assistant, and this line is longer than a terminal has columns: 80."
    row = [(f"{words}\n\n", False), ("A knot.", True), ("\n", False)]
    RunDisplay().show(DataReady(summarize([]), None, 0, row))
    printed = capsys.readouterr().out
    assert printed.endswith(f"in >> <<:\n    {words}\n\n    >>A knot.<<\n")


def test_what_is_left_of_a_long_run_is_in_hours(capsys):
    for seconds, says in ((0.2, "40 s left"), (2, "6 min 38 s left"), (140, "7 h 44 min left")):
        display = RunDisplay()
        display.show(Started(200, 0))
        display.show(Step(1, 1.0, 1e-3, 64, 32, seconds, 10**6))
        assert says in capsys.readouterr().out


def test_memory_is_told_beside_its_plan(capsys):
    for peak, says in ((1_300_000, "30% more than"), (700_000, "30% less than"), (1_000_001, "as")):
        RunDisplay().show(Measured(1_000_000, peak))
        assert f", {says} planned (1.0 MB)" in capsys.readouterr().out


def test_a_small_loss_is_not_said_to_be_none():
    assert [share_text(x) for x in (0.0, 1e-6, 0.0123)] == ["0.00%", "less than 0.01%", "1.23%"]
