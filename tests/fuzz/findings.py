"""What a fuzzer finds: inputs that end wrongly, the shortest for each place in the code."""

import hashlib
import re
from pathlib import Path


class Findings:
    """Files below a directory: an input, and beside it how it ended."""

    def __init__(self, place: Path) -> None:
        self.place, self._sizes = place, dict[str, int]()
        place.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes, end: str, wrong: str) -> None:
        name = hashlib.sha256(f"{end} {_where(wrong)}".encode()).hexdigest()[:12]
        if len(data) < self._sizes.get(name, len(data) + 1):
            self._sizes[name] = len(data)
            (self.place / name).write_bytes(data)
            (self.place / f"{name}.txt").write_text(f"{end}\n{wrong}", encoding="utf-8")


def listed(place: Path) -> list[str]:
    """Return a line for each finding below a directory, also for what libFuzzer has left there."""
    lines = []
    for file in sorted(place.glob("*")):
        text = file.with_suffix(".txt")
        if file.suffix != ".txt":
            words = text.read_text(encoding="utf-8").strip().splitlines() if text.exists() else []
            lines.append(f"{file}: {words[0]}, {words[-1][:200]}" if words else str(file))
    return lines


def _where(wrong: str) -> str:
    """Return what tells a fault from others: its kind, and the last lines of ours that it is in."""
    lines = re.findall(r'File ".*?/src/veneer/(\S+)", line (\d+)', wrong)
    kind = re.split("[:( ]", wrong.strip().splitlines()[-1])[0]
    return f"{lines[-2:]} {kind}"
