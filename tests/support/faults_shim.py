"""The library that makes faults happen, built from faults_shim.c."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("faults_shim.c")


def build(directory: Path) -> Path | None:
    """Return the library, built below a directory, or None where it cannot be: it is for Linux."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    library = directory / "shim.so"
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*command, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library
