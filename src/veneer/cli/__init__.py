"""The command line: it parses, prints and draws, and has no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 for what the user can mend, 130 after Ctrl-C."""
    from veneer.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))
