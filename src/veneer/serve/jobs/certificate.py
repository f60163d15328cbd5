"""The certificate of a merged model as plain values for JSON. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapter.certify import MergeReport


def certificate_of(report: MergeReport) -> dict[str, Any]:
    """Return what a report says, None for a number that is not finite.

    lost: ‖error‖ / ‖ΔW‖ of all weights. effect: how far the adapter moves the base's answers, and
    divergence: how far the merged model's are from the adapter's, in nats a token. problems: what
    is lost beyond what is tolerated.
    """
    worst = report.worst
    return {
        "dtype": report.dtype,
        "tokens": report.tokens,
        "lost": _finite(report.lost),
        "effect": _finite(report.effect),
        "divergence": _finite(report.divergence),
        "worst": None if worst is None else {"path": worst.path, "lost": _finite(worst.lost)},
        "problems": report.problems(),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
