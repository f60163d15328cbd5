"""Puts native parts into a wheel, for every level of processor that `compiling.py` knows.

Only where it is asked for, by HATCH_BUILD_HOOKS_ENABLE=true: it takes minutes. Without it the wheel
is for any machine, and compiles its parts there. $CXX names the compiler, a cross-compiler too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeParts(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # whose sources change
        sys.path.insert(0, str(Path(self.root) / "src"))
        from veneer.kernels.compiling import LEVELS, prebuild, target_of

        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SystemExit(f"There is no compiler {compiler}; name one by $CXX.")
        target = target_of(compiler)
        machine = target.partition("-")[0]
        if machine not in LEVELS or "linux" not in target:
            raise SystemExit(f"No native parts are known for {target}; build without the hook.")
        self.parts_directory = tempfile.TemporaryDirectory()
        directory = Path(self.parts_directory.name)
        try:
            prebuild(compiler, directory, LEVELS[machine])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{' '.join(error.cmd)} failed:\n{error.stderr}") from None
        (directory / "COMMIT").write_text(self._commit() + "\n", encoding="utf-8")
        build_data["force_include"][str(directory)] = "veneer/kernels/prebuilt"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "parts_directory"):
            self.parts_directory.cleanup()

    def _commit(self) -> str:
        """Return the commit that is built, with + where files differ from it."""
        # Neither an image nor unpacked sources have a repository of their own, and perhaps no git.
        if not (Path(self.root) / ".git").exists() or shutil.which("git") is None:
            return "not from a repository"
        command = ["git", "-C", self.root, "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"commit {done.stdout.strip()}" if done.returncode == 0 else "not from a repository"
