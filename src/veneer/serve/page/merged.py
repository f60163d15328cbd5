"""A merge as the page shows it: what its process does, or what its certificate says in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import share_text
from veneer.serve.jobs.merges import Merge


def shown(name: str, merge: Merge | None, root: Path) -> dict[str, Any]:
    """Return a merge for the page; `state` is "none" where nothing is merged yet. root: of runs."""
    if merge is None:
        return {"model": name, "state": "none"}
    certificate = merge.certificate
    return {
        "model": name,
        "state": merge.state,
        "doing": merge.doing or None,
        "why": merge.why or None,
        "bytes": merge.bytes or None,
        "place": os.path.relpath(merge.model, root) if merge.state == "done" else None,
        "certificate": certificate,
        "verdict": None if certificate is None else verdict(certificate),
    }


def verdict(certificate: Mapping[str, Any]) -> str:
    """Return in a sentence how near a merged model is to its adapter."""
    if problems := certificate["problems"]:
        return f"The merged model is not what was learnt: {'; '.join(problems)}."
    effect, divergence = certificate["effect"], certificate["divergence"]
    if not effect or divergence is None:
        return "The merged model answers as the adapter does."
    lost = share_text(divergence / effect)
    return (
        f"The merged model answers as the adapter does, but for {lost} of what the adapter changes."
    )
