"""`python -m bench.gpu`, which the first card is measured by: all of it that needs no card."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import device_laws
from support.card_graphs import broken_graphs
from support.device_laws import LAWS, broken_laws, kinds_to_try
from veneer.models.device import CPU

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import gpu

    return gpu


def test_a_device_keeps_the_laws():
    kind = next(kind for kind in kinds_to_try() if str(kind) == "lora, llama")
    assert broken_laws(kind, CPU) == dict.fromkeys(LAWS, "")


def test_graphs_are_tried():
    broken = broken_graphs(CPU)
    assert broken == dict.fromkeys(broken, "")
    assert len(broken) == 3


def test_the_kinds_that_differ_most_come_first():
    names = [kind.name for kind in kinds_to_try()]
    first = len(set(names))
    assert {"lora", "dora", "prefix", "experts", "mix"} <= set(names[: first + 10])


def test_a_law_that_is_broken_ends_with_exit_code_1(gpu, monkeypatch, capsys):
    def wrong(case):
        torch.testing.assert_close(torch.ones(2), torch.zeros(2))

    law = next(iter(LAWS))
    monkeypatch.setitem(device_laws.LAWS, law, (wrong, lambda kind: True))
    for other in list(LAWS)[1:]:
        monkeypatch.delitem(device_laws.LAWS, other)
    options = ["--pretend", "--only", "laws", "--kinds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *options])
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert f"| {law} | 0 |" in printed
    assert "1 of 1 kinds of adapters were tried; 1 laws are broken." in printed
    assert f"- **{law}, lora, " in printed
    assert "Tensor-likes are not" in printed


def test_without_a_card_it_says_what_to_do(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "resolve_device", lambda name: CPU)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="no accelerator here"):
        gpu.main()


def test_a_card_s_section_replaces_its_earlier_one(gpu):
    page = f"# Figures\n\nText.\n\n{gpu.MARK}\n"
    page = gpu.with_section(page, ["## A", "", "old"])
    page = gpu.with_section(page, ["## B", "", "### Laws", "", "kept"])
    page = gpu.with_section(page, ["## A", "", "new"])
    sections = ["## B\n\n### Laws\n\nkept", "## A\n\nnew"]
    assert page == "\n\n".join([f"# Figures\n\nText.\n\n{gpu.MARK}", *sections]) + "\n"


def test_the_page_is_there_to_be_written(gpu):
    assert gpu.MARK in gpu.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_runs_whole_but_for_the_times():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--pretend"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line in ("| Veneer |", "| veneer |", "| peft sdpa |", "| trl sdpa |", "0 laws are broken"):
        assert line in done.stdout
    wrong = [line for line in done.stdout.splitlines() if "not measured" in line.lower()]
    assert [line for line in wrong if "unsloth" not in line] == []
