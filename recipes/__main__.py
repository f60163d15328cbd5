"""python -m recipes [NAME ...]: writes the rows of recipes into dist/recipes/NAME/."""

import sys
from importlib import import_module
from pathlib import Path

names = sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))
chosen = sys.argv[1:] or names
if unknown := sorted({*chosen} - {*names}):
    sys.exit(f"no such recipe: {', '.join(unknown)}; choose from {', '.join(names)}")
for name in chosen:
    print(import_module(f"recipes.{name}").FAMILY.write(Path("dist/recipes") / name))
