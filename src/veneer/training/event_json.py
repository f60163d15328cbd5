"""Events as JSON, for programs that follow a run: numbers, texts and lists, one object an event."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from veneer.training.events import (
    DataReady,
    Event,
    Failed,
    Merged,
    ModelReady,
    Planned,
)


def event_json(event: Event) -> dict[str, Any]:
    """Return what an event says: "event", its name (`data_ready`), and its fields.

    What JSON has no number for, such as NaN, is null. A plan, what trains and a merge are a few
    numbers each.
    """
    name = re.sub(r"(?<!^)([A-Z])", r"_\1", type(event).__name__).lower()
    return {"event": name, **_fields(event)}


def _fields(event: Event) -> dict[str, Any]:
    match event:
        case Planned(plan, available, processes):
            return {
                "peak": plan.memory.peak,
                "trained": plan.trained.count,
                "available": available,
                "processes": processes,
            }
        case DataReady(summary, held_out, skipped):
            rows = {"rows": _plain(summary), "held_out": _plain(held_out)}
            return {**rows, "skipped": skipped}
        case ModelReady(targets, new_tokens, dtype, quantized):
            return {
                "trained": targets.trained,
                "parameters": targets.base_parameters,
                "layers": len(targets.lines),
                "new_tokens": list(new_tokens),
                "dtype": dtype,
                "bits": None if quantized is None else quantized.bits,
            }
        case Merged(report):
            return {
                "dtype": report.dtype,
                "logit_difference": _plain(report.logit_difference),
                "divergence": _plain(report.divergence),
                "effect": _plain(report.effect),
                "lost": _plain(report.lost),
            }
        case Failed():
            return {"error": event.why}
    return {field.name: _plain(getattr(event, field.name)) for field in fields(event)}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
