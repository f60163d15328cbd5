"""Recipes of `veneer tune` as files."""

from pathlib import Path

import yaml


def write_recipe(path: Path, settings: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
