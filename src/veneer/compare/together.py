"""Runs of a comparison that train in passes over one base that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapter.attach import attach
from veneer.adapter.use import use
from veneer.compare.job import Job, Result
from veneer.compare.measure import (
    Report,
    Taken,
    after_training,
    base_digests,
    facts_of,
    load_data,
    peak_of,
    recipe_of,
)
from veneer.errors import VeneerError
from veneer.models.device import begin_peak
from veneer.models.load import load_base
from veneer.training.events import Failed
from veneer.training.many import running
from veneer.training.many.train import train_many
from veneer.training.memory import begin_measuring
from veneer.training.threads import threads_for


def measure_together(
    jobs: Sequence[Job], runs: Path, report: Report
) -> Iterator[tuple[Job, Result]]:
    """Train low-rank jobs over one base together, then measure each by itself, and yield what it
    measured. Of a job that fails `report` gets the error; the others go on.

    Raises VeneerError where none of them can begin.
    """

    def reports_of(job: Job) -> Report:
        return lambda message: report({**message, "job": job.name})

    report({"doing": "loading"})
    first = jobs[0]
    base = load_base(first.model, device=first.device, dtype=first.dtype)
    model = base.model
    for notice in base.notices:
        report({"notice": notice})
    torch.set_num_threads(threads_for(model))
    data, digests = load_data(first, base), base_digests(model)
    facts = {job.name: facts_of(job, base, data) for job in jobs}
    names = {f"run {number}": job for number, job in enumerate(jobs)}  # of their adapters
    trained: dict[str, int] = {}
    for name, job in names.items():
        model.requires_grad_(False)
        attach(model, recipe_of(job).what_trains, name=name, seed=job.seed)
        trained[name] = sum(w.numel() for w in model.parameters() if w.requires_grad)
    use(model, None)
    begin_peak(model.device)
    begin_measuring()
    taken = {name: Taken(reports_of(job)) for name, job in names.items()}
    errors: dict[str, str] = {}
    together = {
        name: running.Job(data.training, recipe_of(job).training) for name, job in names.items()
    }
    for name, event in train_many(model, together):
        if isinstance(event, Failed):
            errors[name] = event.why
        else:
            taken[name].take(event)
    peak = peak_of(model.device)
    for name, job in names.items():
        own_report = reports_of(job)
        if name in errors:
            own_report({"error": errors[name]})
            continue
        try:
            course: Mapping[str, Any] = taken[name].facts()
            use(model, name)
            measured = after_training(job, base, data, digests, runs, own_report)
        except (VeneerError, OSError) as error:
            own_report({"error": str(error)})
            continue
        own: dict[str, Any] = {"trained": trained[name], "peak": peak, "together": len(jobs)}
        yield job, Result(**facts[job.name], **course, **measured, **own)
