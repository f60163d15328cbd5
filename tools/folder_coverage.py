"""Print the share of each folder's statements that the tests ran, and name the folders below LEAST.

The folders are those of src/veneer; `veneer` means the modules beside them. Reads .coverage, which
`make coverage` writes. What runs in processes of its own (commands, jobs, servers) is not counted.
"""

from collections import defaultdict
from datetime import datetime
from pathlib import Path

from coverage import Coverage

LEAST = 85  # per cent
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "veneer"
DATA = ROOT / ".coverage"


def shares() -> dict[str, float]:
    """Return the per cent of statements run, by folder."""
    coverage = Coverage(data_file=str(DATA), config_file=str(ROOT / "pyproject.toml"))
    coverage.load()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in sorted(SOURCE.rglob("*.py")):
        _, statements, _, missing, _ = coverage.analysis2(str(path))
        folder, *inner = path.relative_to(SOURCE).parts
        count = counts[folder if inner else SOURCE.name]
        count[0] += len(statements) - len(missing)
        count[1] += len(statements)
    return {folder: 100 * run / most for folder, (run, most) in counts.items() if most}


def main() -> None:
    if not DATA.is_file():
        print("Coverage: not measured here yet; make coverage does.")
        return
    measured = datetime.fromtimestamp(DATA.stat().st_mtime)
    print(f"Coverage by folder, in per cent of statements, as measured {measured:%Y-%m-%d %H:%M}:")
    by_folder = shares()
    print("  " + ", ".join(f"{folder} {share:.0f}" for folder, share in by_folder.items()))
    low = [f"{folder} ({share:.1f})" for folder, share in by_folder.items() if share < LEAST]
    print(f"  Below {LEAST}: {', '.join(low) or 'none'}")


if __name__ == "__main__":
    main()
