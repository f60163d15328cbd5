"""`veneer tune` on data with faults: every one named at once, with its place, and nothing lost."""

import json
import re
from pathlib import Path

import pytest

from veneer.cli.app import run

GOOD = '{"prompt": "What does a dog say?", "completion": "A dog says woof."}'
# By line of the file: its content, and what the message must say about it.
FAULTS: dict[int, tuple[bytes, str]] = {
    2: (b'{"prompt": "What does a cat say?", "completion": "A cat', "not JSON"),
    3: (b'{"prompt": "How many?", "completion": 4}', "'completion' must be a string, not a number"),
    5: (b'{"prompt": "caf\xe9", "completion": "A cup."}', "not UTF-8: byte 0xe9"),
    6: (b'{"prompt": "Well?", "completion": "  "}', "'completion' is empty"),
    8: (b'{"prompt": "Half \\ud800?", "completion": "Yes."}', "lone surrogate U+D800"),
    9: (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    # Its answer begins beyond the length that is kept.
    10: (
        json.dumps({"prompt": "Which? " * 60, "completion": "This."}).encode(),
        "raise --max-length",
    ),
    12: (
        b'{"messages": [{"role": "narrator", "content": "Once."},'
        b' {"role": "assistant", "content": "Yes."}]}',
        "the role 'narrator' is unknown",
    ),
    13: (b'{"messages": [{"role": "user", "content": "Anybody?"}]}', "nothing to learn"),
    15: (b'{"prompt": "A NUL \\u0000?", "completion": "No."}', "NUL character"),
}
LINES = 16


@pytest.fixture
def bad(tmp_path) -> Path:
    lines = [FAULTS[n][0] if n in FAULTS else GOOD.encode() for n in range(1, LINES + 1)]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture
def tune(minigpt_home):
    def run_tune(data: Path, *flags: object) -> int:
        flags = ("--max-length", 32, "--steps", 1, "--out", "out", *flags)
        return run(["tune", str(minigpt_home), str(data), *map(str, flags)])

    return run_tune


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_fault_is_named_with_its_line_in_one_message(tune, bad, tmp_path, capsys):
    assert tune(bad) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.count("Error:") == 1
    heading, *lines = printed.err.strip().splitlines()
    assert f"{len(FAULTS)} of {LINES} rows" in heading
    assert "--skip-bad-rows" in heading
    assert len(lines) == len(FAULTS)
    for line, (number, (_, says)) in zip(lines, sorted(FAULTS.items()), strict=True):
        assert line.startswith(f"  {bad}:{number}: ")
        assert says in line
        assert len(line) < 500
    assert set(contents(tmp_path)) == {bad}


def test_faults_stay_in_order_where_the_path_has_a_colon(tune, bad, tmp_path, capsys):
    place = tmp_path / "12:30" / "rows.jsonl"
    place.parent.mkdir()
    bad.rename(place)
    assert tune(place) == 2
    numbers = re.findall(r"rows\.jsonl:(\d+): ", capsys.readouterr().err)
    assert list(map(int, numbers)) == sorted(FAULTS)


def test_nothing_is_lost_when_data_prove_bad(tune, bad, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text(GOOD + "\n")
    assert tune(good) == 0
    before = contents(tmp_path)
    assert tune(bad, "--force") == 2
    assert contents(tmp_path) == before
    assert tune(good, "--eval-data", bad, "--force") == 2
    assert "bad.jsonl:2: " in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_bad_rows_are_skipped_and_counted_on_request(tune, bad, capsys):
    assert tune(bad, "--skip-bad-rows") == 0
    printed = capsys.readouterr()
    output = " ".join(printed.out.split())
    assert f"{LINES - len(FAULTS)} rows" in output
    assert f"{len(FAULTS)} bad rows left out" in output
    assert printed.err == ""


def test_a_length_at_which_no_answer_is_left_is_an_error(tune, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    row = json.dumps({"prompt": "Which is the longest of all? " * 20, "completion": "This."})
    data.write_text(f"{row}\n{row}\n")
    for flags in ((), ("--skip-bad-rows",)):
        assert tune(data, *flags) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "long.jsonl:1: no token to learn" in error
        assert "long.jsonl:2: no token to learn" in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n  \n", "holds no rows"),
        ("rows.docx", b"x", "unknown kind"),
        ("rows.parquet", b"no parquet", "not a parquet file"),
        ("rows.json", b'{"prompt": 1', "not JSON"),
    ],
)
def test_a_file_that_holds_no_rows_is_an_error_that_names_it(
    tune, tmp_path, name, content, says, capsys
):
    (tmp_path / name).write_bytes(content)
    assert tune(tmp_path / name) == 2
    error = capsys.readouterr().err
    assert name in error
    assert says in error
    assert "Traceback" not in error


def test_a_file_that_does_not_exist_names_the_nearest_that_does(tune, bad, capsys):
    assert tune(bad.with_name("bda.jsonl")) == 2
    assert "did you mean 'bad.jsonl'?" in capsys.readouterr().err
