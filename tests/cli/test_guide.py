"""`veneer` alone: the guided start, typed through in a terminal, and the page that shows it."""

import os
import pty
import re
import select
import subprocess
from pathlib import Path

import pytest

from support.warm import executable
from veneer.cli import guide
from veneer.cli.app import run
from veneer.cli.guide import TEMPLATE, _edited, _free, _rows
from veneer.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "guided-start.md"
TYPED = [  # what is asked, and what is typed then
    ("Number, or a directory, .gguf file or hub name [1]: ", "minigtp"),
    ("Number, or a directory, .gguf file or hub name [1]: ", "minigpt"),
    ("File of rows, or Enter to write five in an editor: ", "rows.csv"),
    ("File of rows, or Enter to write five in an editor: ", ""),
    ("Train an adapter now? [Y/n]: ", "y"),
    ("You: ", "What is plimbo?"),
    ("You: ", ""),
]
# How a page's lines begin that another machine prints otherwise, and what is left out.
BY_MACHINE = ("...", "Trained", "Verdict", "would say more", "The", "note Chosen", "about 0 steps")
PATIENCE = 300  # seconds without any output, after which nothing more is expected


def test_questions_and_answers_become_rows():
    rows = _rows(TEMPLATE)
    assert len(rows) == 5
    assert rows[0]["prompt"] == "What is plimbo?"
    assert all(set(row) == {"prompt", "completion"} and all(row.values()) for row in rows)
    assert _rows("Q: a\nand b\nA: c\n\nd\n") == [{"prompt": "a\nand b", "completion": "c\nd"}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# nothing\n", ["there is no question"]),
        ("Q: a\nQ: b\nA: c\nA: d\n", ["line 2: the question before", "line 4: it begins"]),
        ("Q: a\n", ["the last question has no answer"]),
        ("hello\n", ["line 1: it begins"]),
        ("Q:\nA: b\nQ: c\nA:\n", ["the question of row 1 is empty", "the answer of row 2"]),
    ],
)
def test_all_lines_at_fault_are_named(text, says):
    with pytest.raises(DataError) as error:
        _rows(text)
    assert all(words in str(error.value) for words in says)


def test_what_an_editor_saves_in_another_encoding_is_named(monkeypatch):
    saves = r"""sh -c 'printf "\357\273\277Q: a\nA: gr\374n\n" > "$1"' sh"""
    monkeypatch.setenv("VISUAL", saves)
    with pytest.raises(DataError, match="rows: line 2: not in UTF-8"):
        _rows(_edited(TEMPLATE))


def test_a_digit_that_is_no_number_is_no_base(monkeypatch, capsys):
    monkeypatch.setattr(guide, "_candidates", lambda: iter([("tiny", "1", "1 MB", "yes", "here")]))
    answers = iter("²1")
    monkeypatch.setattr(guide, "_asked", lambda _: next(answers))
    assert guide._base() == "tiny"
    assert "no model here" in capsys.readouterr().err


def test_a_mistyped_name_of_rows_is_answered_with_the_nearest(tmp_path, monkeypatch, capsys):
    for name in ("kites.jsonl", "kites.exe"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    answers = iter(["kitez.jsonl", "kites.exe", "kites.jsonl"])
    monkeypatch.setattr(guide, "_asked", lambda _: next(answers))
    assert guide._data() == "kites.jsonl"
    error = capsys.readouterr().err
    assert "kitez.jsonl does not exist; did you mean 'kites.jsonl'?" in error
    assert "kites.exe is of an unknown kind" in error


def test_nothing_that_is_there_is_replaced(tmp_path):
    assert _free(tmp_path / "rows.jsonl").name == "rows.jsonl"
    for name in ("rows.jsonl", "rows-2.jsonl"):
        (tmp_path / name).touch()
    assert _free(tmp_path / "rows.jsonl").name == "rows-3.jsonl"


def test_without_a_terminal_it_is_the_help(capsys):
    assert run([]) == 0
    assert "tune" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_shows_what_a_person_sees(minigpt_home, tmp_path):
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "minigpt").symlink_to(minigpt_home)
    ours, theirs = pty.openpty()
    environment = {name: text for name, text in os.environ.items() if name != "COLUMNS"}
    program = subprocess.Popen(
        [executable(), "-m", "veneer"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env=environment | {"EDITOR": "true", "TERM": "dumb"},
    )
    os.close(theirs)
    shown = ""
    for asked, answer in TYPED:
        shown += _until(ours, asked)
        os.write(ours, f"{answer}\n".encode())
    shown += _until(ours, "")
    os.close(ours)
    assert program.wait() == 0
    shown, place = _alike(shown), 0
    for line in _lines_of_the_page():
        at = shown.find(line, place)
        assert at >= 0, f"{line!r} is not behind\n{shown[:place]}"
        place = at + len(line)


def _until(terminal: int, text: str) -> str:
    """Return what is printed up to a text, or up to the end."""
    shown = b""
    while not text or not shown.endswith(text.encode()):
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        assert ready, shown.decode(errors="replace")
        try:
            piece = os.read(terminal, 1)
        except OSError:  # the program has ended
            piece = b""
        if not piece:
            assert not text, shown.decode(errors="replace")
            break
        shown += piece
    return shown.decode(errors="replace")


def _lines_of_the_page() -> list[str]:
    """Return the lines that the page shows, without those that differ from machine to machine."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [_alike(line) for block in blocks for line in block.splitlines()]
    assert len(lines) > 20
    return [line for line in lines if line and not line.startswith(BY_MACHINE)]


def _alike(text: str) -> str:
    """Return a text without escapes, in which all numbers, units and spaces are the same."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    text = re.sub(r"\d[\d.,]*", "0", text)
    text = re.sub(r"0 [kMG]?B\b", "0 B", text)
    text = re.sub(r"\b(yes|no|just)\b", "yes", text)
    return re.sub(r"[\s─]+", " ", text).strip()
