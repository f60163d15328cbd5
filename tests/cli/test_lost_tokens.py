"""The line on the data says what share of all tokens is lost, in red where it is much."""

import pytest

import veneer.cli.progress
from support.screen import Screen
from veneer.cli.console import Terminal
from veneer.data.columns import Summary
from veneer.training.events import DataReady


@pytest.mark.parametrize(
    ("lost", "colour"), [(0, None), (10, "\x1b[33m"), (11, "\x1b[31m"), (500, "\x1b[31m")]
)
def test_what_is_lost_is_red_above_one_per_cent(monkeypatch, lost, colour):
    environment = {"TERM": "xterm"}
    console = Terminal(
        file=Screen(), _environ=environment, color_system="standard", width=200, highlight=False
    )
    monkeypatch.setattr(veneer.cli.progress, "OUTPUT", console)
    tokens = 1000 - lost
    summary = Summary(9, tokens, 90, truncated=2, longest=30, lost=lost, dropped=1, unread=0)
    veneer.cli.progress.RunDisplay().show(DataReady(summary, None, 0, []))
    printed = console.file.getvalue()
    says = f"{lost / 1000:.2%} of all tokens lost (rows: 2 cut off, 1 left out as too long)"
    assert (f"{colour}{says}" in printed) == bool(lost)
    assert ("lost" in printed) == bool(lost)
