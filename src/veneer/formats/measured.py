"""What a run measured and what its base is licensed by: lines of a model card, as far as known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from veneer.models.locate import BUILT_IN, HUB_NAMES
from veneer.run_directory import RunDirectory

# By the publishers' own cards. Others are read from the card beside the base.
LICENCES = {"smollm2-135m": "apache-2.0"}


def run_of(adapter: Path) -> RunDirectory | None:
    """Return the run that an adapter's directory, or a checkpoint's, is part of, if it is one."""
    for place in adapter.absolute().parents[:3]:
        if (run := RunDirectory(place)).metrics.is_file():
            return run
    return None


def measured(run: RunDirectory) -> dict[str, str]:
    """Return what a run measured, by what it is called."""
    lines = run.read_metrics()
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    figures: dict[str, str] = {}
    if steps:
        figures["steps"] = f"{steps[-1]['step']:,}"
        figures["tokens"] = f"{sum(line['tokens'] for line in steps):,}"
        figures["training loss, first and last step"] = _course(steps, "loss")
    what, name = "loss", "eval_loss"
    if of_prompts := [line for line in evaluations if "eval_reward" in line]:
        what, name, evaluations = "reward", "eval_reward", of_prompts
    if evaluations:
        best = min(evaluations, key=_finite)
        figures[f"held-out {what}, first and last"] = _course(evaluations, name)
        figures[f"held-out {what}, best"] = f"{best[name]:.4f} (step {best['step']:,})"
    if verdict := run.read_progress().get("verdict"):
        figures["verdict"] = str(verdict)
    return figures


def licence_of(base: str) -> str | None:
    """Return the licence in the card of a base that is here, None where it is not known."""
    built_in = next((name for name in BUILT_IN if base in (name, HUB_NAMES.get(name))), "")
    if built_in in LICENCES:
        return LICENCES[built_in]
    card = Path(base) / "README.md" if base else Path()
    if base.count("/") == 1 and not card.is_file():
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # no name of the hub
            cached = try_to_load_from_cache(base, "README.md")
            card = Path(cached) if isinstance(cached, str) else card
    return _licence_in(card) if card.is_file() else None


def _licence_in(card: Path) -> str | None:
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return None
    with suppress(yaml.YAMLError):
        head = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0])
        licence = head.get("license") if isinstance(head, Mapping) else None
        if isinstance(licence, str):
            return str(head["license_name"]) if "license_name" in head else licence
    return None


def _course(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{lines[0][name]:.4f}, {lines[-1][name]:.4f}"


def _finite(line: Mapping[str, Any]) -> float:
    loss = float(line["eval_loss"])
    return loss if math.isfinite(loss) else math.inf
