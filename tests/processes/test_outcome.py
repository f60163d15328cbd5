"""What an elastic agent starts again ends as before, where starting again cannot help."""

from pathlib import Path

import pytest

from veneer.cli import main
from veneer.processes.outcome import is_final, note_outcome, noted_outcome


def start(monkeypatch: pytest.MonkeyPatch, place: Path, attempt: int) -> None:
    errors = place / f"attempt_{attempt}/0/error.json"
    errors.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(errors))


def test_a_wrong_flag_is_said_in_the_first_attempt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for attempt in range(3):
        start(monkeypatch, tmp_path, attempt)
        with pytest.raises(SystemExit) as ended:
            main(["tune", "model", "rows.jsonl", "--no-such-flag", "1"])
        assert ended.value.code == 2
        printed.append(capsys.readouterr().err)
    assert "--no-such-flag" in printed[0]
    assert printed[1:] == ["", ""]


def test_only_what_would_end_alike_is_final() -> None:
    codes = {0: False, 1: False, 2: True, 3: True, 130: False, 143: False}
    assert {code: is_final(code) for code in codes} == codes


def test_nothing_is_noted_where_no_agent_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (None, "/dev/null"):
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
        if place:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
        note_outcome(2)
        assert noted_outcome() is None
