"""Settings in files, recipe.yaml and jobs.yaml, as tune's flags take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Methods that are LoRA with other settings: tune runs, and keeps in recipe.yaml, what they mean.
SHORT: dict[str, dict[str, Any]] = {"qlora": {"bits": 4}, "dora": {"dora": True}}
SEARCHED = ("lr", "rank")  # which a search before the run chooses where they are "auto"
AS_JSON = ("data", "invocation")  # whose lists cyclopts would take apart


def as_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return each setting as its flag would take it: a pattern may hold dots, which cyclopts would
    take for deeper levels, but not within JSON."""
    return {
        k: json.dumps(v) if isinstance(v, dict) or (k in AS_JSON and isinstance(v, list)) else v
        for k, v in settings.items()
    }
