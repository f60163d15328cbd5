"""Ctrl-C while a command works: one line, exit code 130, and nothing half-written."""

import os
import signal

import pytest

import veneer
from support.random_adapters import shake
from veneer import files
from veneer.cli.app import run


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_ctrl_c_leaves_nothing_half_written(command, minigpt_home, tmp_path, monkeypatch, capsys):
    base = veneer.load_base(minigpt_home)
    veneer.attach(base.model, veneer.LoRA(rank=2, targets="all"))
    adapter, out = tmp_path / "adapter", tmp_path / "results" / "out"
    veneer.save(shake(base.model, size=0.05), adapter, tokenizer=base.tokenizer)
    arguments = {
        "merge": ["merge", str(minigpt_home), str(adapter), str(out), "--accept-loss"],
        "convert": ["convert", str(adapter), str(out), "--to", "peft"],
    }[command]
    settle, interrupted = files._settle, []

    def interrupt(path):
        settle(path)
        if not interrupted:  # when the first file is written, but not yet in its place
            interrupted.append(path)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(files, "_settle", interrupt)
    capsys.readouterr()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        assert run(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted
    *doing, last = capsys.readouterr().err.splitlines()
    assert last == "Interrupted."
    assert all(line.endswith(" ...") for line in doing)  # what merge was at, and no traceback
    assert list((tmp_path / "results").iterdir()) == []
    assert run(arguments) == 0
