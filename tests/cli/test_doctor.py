"""`veneer doctor`: what it prints, that it is quick to begin, and that nothing private is in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli.console import OUTPUT
from veneer.doctor.report import plain, without_private

# What is known before the measurements must not wait for torch.
BEGIN = """
import sys
from veneer.cli import app, doctor
doctor._show(dict(doctor._known(doctor.facts())))
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


@pytest.fixture
def measured_quickly(monkeypatch):
    """Let the measurements be of little, whose figures nobody reads."""
    from veneer.doctor import measure

    for name in ("COPIED", "ON_DISK", "PIECE"):
        monkeypatch.setattr(measure, name, 2**16)
    monkeypatch.setattr(measure, "ROWS", 8)
    monkeypatch.setattr(measure, "WIDTH", 64)


def test_the_report_has_facts_figures_and_advice(shown, measured_quickly, monkeypatch):
    monkeypatch.setattr(OUTPUT, "_width", 80)
    printed = shown("doctor")
    titles = "Processor Cores Versions Kernels Products What"  # to do
    lines = [line.split(" ")[0] for line in printed.splitlines() if line]
    assert [title for title in lines if title in titles.split()] == titles.split()
    # A path is never broken, so that it can be copied.
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in printed.splitlines())
    assert "GFLOP/s" in printed
    report = json.loads(shown("doctor", "--json"))
    assert {"facts", "figures", "remarks"} == report.keys()
    assert report["figures"]["products"]["float32"] > 0
    assert list(Path.cwd().iterdir()) == []


def test_it_begins_without_torch():
    done = subprocess.run([sys.executable, "-c", BEGIN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Processor" in done.stdout


def test_nothing_private_is_shown(shown, measured_quickly, monkeypatch, tmp_path):
    home = tmp_path / "home" / "jmueller"
    place = home / "secret-not" / "jmueller"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "jmueller")
    monkeypatch.setattr("socket.gethostname", lambda: "mueller-laptop")
    monkeypatch.setenv("CXX", "/opt/jmueller/c++ on mueller-laptop")
    for flags in ([], ["--json"]):
        printed = " ".join(shown("doctor", *flags).split())
        assert "~/secret-not/USER" in printed
        assert "/opt/USER/c++ on HOST" in printed
        assert "jmueller" not in printed
        assert "mueller-laptop" not in printed


def test_words_that_only_look_private_stay(monkeypatch):
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    text = "/home/anna and annexes on localhost"
    assert without_private(text) == text
    assert plain({"a": ("/home/ann/b", 1, None)}) == {"a": ["~/b", 1, None]}
