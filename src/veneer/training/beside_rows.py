"""Where numbers that another model gives the rows of a run are kept: beside the encoded rows, for
whoever trains on the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.data import cache

# What of a run's identity such numbers depend on; sizes of passes, by their rounding.
DECIDES = (
    *("split", "base", "data", "computed_in", "method", "bits", "pack_head", "device"),
    *("tokens_per_step", "tokens_per_batch"),
)


def place_of(identity: Mapping[str, Any], file: str, *more: str) -> Path:
    """Return where a file is kept, by the run's identity. more: settings that decide it, too."""
    settings = {name: identity.get(name) for name in (*DECIDES, *more)}
    text = json.dumps(settings, sort_keys=True, default=str)
    return cache.home() / hashlib.sha256(text.encode()).hexdigest()[:32] / file
