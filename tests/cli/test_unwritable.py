"""An OUT that cannot be written to is refused before anything is loaded or trained."""

import errno
import os
import tempfile
from typing import NoReturn

import pytest

import veneer
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer import files
from veneer.cli.app import run


@pytest.fixture
def adapter(tmp_path):
    veneer.save(shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2))), tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def read_only(monkeypatch):
    def refuse(dir: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(files, "new_directory", lambda *_, **__: pytest.fail("it writes"))


COMMANDS = {
    "pretrain": ["pretrain", "OUT"],
    "combine": ["combine", "ADAPTER", "ADAPTER", "OUT"],
    "convert": ["convert", "ADAPTER", "OUT", "--to", "peft"],
    "merge": ["merge", "BASE", "ADAPTER", "OUT"],
    "extract": ["extract", "BASE", "BASE", "OUT", "--rank", "2"],
    "export": ["export", "ADAPTER", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused(command, adapter, read_only, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    names = {"OUT": "not/here", "ADAPTER": adapter, "BASE": "minigpt"}
    assert run([names.get(word, word) for word in COMMANDS[command]]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "cannot be written to (Read-only file system); name another place" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_has_a_code_of_its_own(adapter, monkeypatch, capsys):
    def full(dir: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert run(["convert", adapter, "out", "--to", "peft"]) == 75
    assert "out cannot be written: the disk is full." in capsys.readouterr().err
