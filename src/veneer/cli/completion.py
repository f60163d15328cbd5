"""`veneer completion SHELL`: prints what lets a shell complete commands and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

Shell = Literal["bash", "zsh", "fish"]
# Cyclopts' script for zsh is a file to autoload; evaluated, it only defines a function.
REGISTERED = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _cyclopts_veneer veneer"""


def completion(shell: Annotated[Shell, Parameter(help="The shell to print it for.")], /) -> int:
    """Print the script, made of the commands as they are parsed, and return an exit code."""
    from veneer.cli.app import app

    print(app.generate_completion(shell=shell), end="")
    if shell == "zsh":
        print(REGISTERED)
    return 0
