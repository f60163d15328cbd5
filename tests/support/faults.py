"""Commands of Veneer under faults of the disk, and what must hold afterwards.

A fault is the k-th call of a kind that touches the case's directory, and what becomes of it.
`faults_shim.c`, preloaded into the process that all programs of `support.warm` are forked from,
makes it happen.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from support import warm
from support.file_trees import tree

KINDS = ("open", "read", "write", "fsync", "rename", "mkdir", "remove", "mmap", "any")
FULL = ("ENOSPC", "EDQUOT")  # which last until space is made
EFFECTS = {name: getattr(errno, name) for name in (*FULL, "EIO", "ENOMEM")}
EFFECTS |= {"short": 1001, "kill": 1002, "torn": 1003}
SUFFERS: dict[str, tuple[str, ...]] = {
    "open": ("ENOSPC", "EIO"),  # of a file that is made
    "read": ("EIO",),  # opened as it is
    "write": ("ENOSPC", "EDQUOT", "EIO", "short"),
    "fsync": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EIO"),
    "remove": ("EIO",),
    "mmap": ("ENOMEM",),
    "any": ("kill", "torn"),
}
LAYOUT = struct.Struct("1024s1024s4q9q")  # `struct state` of faults_shim.c
PROGRAM = "support.faulty_program"
POINTS = "fault points"  # the name under which a test reports how many faults it let happen
Units = dict[str, dict[str, bytes] | None]  # files of each result, None for none
EXIT_CODES = (0, 2, 75)  # done all the same; to be mended; to be tried again


@dataclass(frozen=True)
class Fault:
    """What the k-th call of a kind suffers."""

    kind: str
    effect: str
    k: int

    @property
    def kills(self) -> bool:
        return self.effect in ("kill", "torn")


NONE = Fault("any", "kill", 0)


@dataclass(frozen=True)
class Command:
    """A command that writes.

    arguments: for a disk, with `again` instead of them where the second try has others
    results: what it leaves, below the disk, each of which is whole or as it was
    before: makes the disk what it is before the command
    marker: the file without which a directory of results is taken for none: such a directory is
        written piece by piece, and a second try goes on with it
    program: the module that takes the arguments
    look: reads what is left of a disk instead of files by their names: a mapping of what has a name
        in results, and more that must be as it was undisturbed after a second try
    """

    name: str
    arguments: Callable[[Path], list[str]]
    results: tuple[str, ...]
    before: Callable[[Path], None] = lambda disk: None
    again: Callable[[Path], list[str]] | None = None
    marker: str | None = None
    program: str = PROGRAM
    look: Callable[[Path], Units] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what was counted on the way."""

    code: int
    errors: str
    counts: Mapping[str, int]
    hits: int
    where: str


class Case:
    """A command on a disk of its own, which each fault finds as it was before."""

    def __init__(self, command: Command, home: Path) -> None:
        self.command, self.disk, self.state = command, home / "disk", home / "state"
        self.template, self.seen = home / "template", dict[str, str | None]()
        self.template.mkdir(parents=True)
        command.before(self.template)
        self.before = self._units(self.template)
        self.undisturbed = self.run(NONE)
        assert self.undisturbed.code == 0, self.undisturbed.errors
        self.after, self.names = self._units(self.disk), paths_below(self.disk)

    def run(self, fault: Fault) -> Outcome:
        """Run the command once, on the disk as it was before."""
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.copytree(self.template, self.disk)
        return self._run(self.command.arguments(self.disk), fault)

    def again(self, fault: Fault) -> Outcome:
        """Try once more, on the disk as it is now."""
        return self._run((self.command.again or self.command.arguments)(self.disk), fault)

    def is_done(self) -> bool:
        """Return whether all results are those of the undisturbed command."""
        return self._units(self.disk) == self.after

    def _run(self, arguments: list[str], fault: Fault) -> Outcome:
        below = str(self.disk.resolve()).encode()
        numbers = (KINDS.index(fault.kind), EFFECTS[fault.effect], fault.k, 0)
        self.state.write_bytes(LAYOUT.pack(below, b"", *numbers, *[0] * len(KINDS)))
        command = [self.command.program, *arguments]
        done = run_on(self.disk, *command, FAULTS_STATE=str(self.state))
        _, where, _, _, _, hits, *counts = LAYOUT.unpack(self.state.read_bytes())
        counted = dict(zip(KINDS, counts, strict=True))
        return Outcome(
            done.returncode,
            done.stderr,
            counted,
            hits,
            where.rstrip(b"\0").decode(errors="replace"),
        )

    def faults(self) -> Iterator[Fault]:
        """Yield every fault of every call that the undisturbed command makes."""
        for kind, effects in SUFFERS.items():
            for effect in effects:
                for k in range(1, self.undisturbed.counts[kind] + 1):
                    yield Fault(kind, effect, k)

    def violation(self, fault: Fault) -> str | None:
        """Let a fault happen, and say what is wrong afterwards, if anything is."""
        outcome = self.run(fault)
        wrong = self._wrong_end(fault, outcome) or self._wrong_disk(fault, outcome)
        if wrong is None:
            # What follows depends on nothing but the disk: one try for each state of it.
            key = repr(sorted((name, hash(content)) for name, content in tree(self.disk).items()))
            if key not in self.seen:
                self.seen[key] = self._wrong_second_try()
            wrong = self.seen[key]
        place = outcome.where.removeprefix(f"{self.disk}/")
        return f"{fault.effect} at {fault.kind} {fault.k} ({place}): {wrong}" if wrong else None

    def _wrong_end(self, fault: Fault, outcome: Outcome) -> str | None:
        if not outcome.hits:
            return None  # fewer calls than usual: two threads or processes share the work
        if fault.kills:
            return None if outcome.code == -signal.SIGKILL else f"exit code {outcome.code}"
        return wrong_words(outcome.code, outcome.errors, self.disk)

    def _wrong_disk(self, fault: Fault, outcome: Outcome) -> str | None:
        units = self._units(self.disk)
        for name in self.command.results:
            if outcome.code == 0 and units[name] != self.after[name]:
                return f"exit code 0, but {name} is not what it should be{self._more(outcome)}"
            if units[name] not in (self.before[name], self.after[name]):
                what = "gone" if units[name] is None else "half-written"
                return f"{name} is {what}{self._more(outcome)}"
        # What cannot be removed waits for the next start.
        if fault.kind not in ("any", "read", "remove") and (
            more := self._strange_names(paths_below(self.disk))
        ):
            return f"left behind: {more}{self._more(outcome)}"
        return None

    def _more(self, outcome: Outcome) -> str:
        return f"\n{outcome.errors[-600:]}" if outcome.errors else ""

    def _wrong_second_try(self) -> str | None:
        """Run the command again, on a disk that is whole again, and say what is wrong then."""
        done = self.is_done()
        outcome = self.again(NONE)
        refused = outcome.code == 2 and "already" in outcome.errors
        if outcome.code != 0 and not (done and refused):
            return f"tried again, exit code {outcome.code}\n{outcome.errors}"
        if not self.is_done():
            return f"tried again, it gives another result: {self.other_files()}"
        if more := self._strange_names(paths_below(self.disk)):
            return f"left behind after a second try: {more}"
        return None

    def other_files(self) -> list[str]:
        """Return the files of results that are not those of the undisturbed command."""
        others: list[str] = []
        for unit, files in self._units(self.disk).items():
            ours, theirs = files or {}, self.after[unit] or {}
            names = sorted(ours.keys() | theirs.keys())
            others += [f"{unit}/{name}" for name in names if ours.get(name) != theirs.get(name)]
        return others

    def _strange_names(self, now: set[str]) -> list[str]:
        return sorted(name for name in now if name not in self.names and is_temporary(name))

    def _units(self, disk: Path) -> Units:
        if self.command.look is not None:
            return self.command.look(disk)
        units: Units = {}
        for name in self.command.results:
            path = disk / name
            files = (
                tree(path) if path.is_dir() else {"": path.read_bytes()} if path.exists() else {}
            )
            if self.command.marker is not None and self.command.marker not in files:
                files = {}
            units[name] = files or None
        return units


def run_on(disk: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module with arguments, and all that it writes on a disk: temporary files and caches
    too."""
    own = {"VENEER_CACHE": str(disk / "cache"), "TMPDIR": str(disk)}
    own["PYTHONWARNINGS"] = "default::UserWarning"
    return subprocess.run(
        [warm.executable(), "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=disk.parent,
        stdin=subprocess.DEVNULL,
        env=os.environ | own | environment,
    )


def wrong_words(code: int, errors: str, disk: Path) -> str | None:
    """Say what is wrong with how a command ended whose disk failed it, if anything is."""
    if "Traceback" in errors or "Exception ignored" in errors:
        return f"a traceback\n{errors}"
    if code not in EXIT_CODES:
        return f"exit code {code}\n{errors}"
    if code == 0:
        return None
    lines = errors.strip().splitlines()
    if errors.count("Error:") != 1 or not lines[-1].startswith("Error:"):
        return f"not one line of error at the end:\n{errors}"
    if str(disk) not in lines[-1]:
        return f"an error that does not say where:\n{lines[-1]}"
    return None


def paths_below(disk: Path) -> set[str]:
    """Return all files and directories below a disk."""
    return {str(path.relative_to(disk)) for path in disk.rglob("*")}


def is_temporary(name: str) -> bool:
    """Return whether a file, or a directory above it, has a name that files.py gives what is being
    written, or is one of Python's own temporary files."""
    return any(re.match(r"\.|tmp", piece) for piece in Path(name).parts)
