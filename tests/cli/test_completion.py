"""veneer completion: every command and flag is in the script, and a shell can read it."""

import re
import shutil
import subprocess

import pytest

from veneer.cli.app import app, run

COMMANDS = {name for name in app if not name.startswith("-")}
FLAGS = {"rslora", "tokens-per-step", "lora-plus-ratio", "gguf-type", "drain-seconds"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_completes_every_command_and_its_flags(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in COMMANDS | FLAGS if name not in script] == []
    if shell == "bash":
        asked = 'COMP_WORDS=(veneer tu); COMP_CWORD=1; _veneer; echo "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["tune"]
    elif shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_zsh_completes_after_eval(capsys):
    assert run(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    function = re.search(r"^(\w+)\(\) \{$", script, re.MULTILINE)[1]
    assert script.splitlines()[-1] == f"compdef {function} veneer"
    if zsh := shutil.which("zsh"):
        command = [zsh, "-f", "-c", f"{script}\nprint $_comps[veneer]"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == function


def test_another_shell_is_refused_with_the_choices(capsys):
    assert run(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
