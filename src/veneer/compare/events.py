"""What happens in a comparison, as values that it yields."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.compare.job import Job, Result
from veneer.training.events import Event


@dataclass(frozen=True, slots=True)
class ComparisonStarted(Event):
    """The names of the comparison's runs, in order, and the seeds of each."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    """A process begins its job."""

    job: Job


@dataclass(frozen=True, slots=True)
class JobStep(Event):
    """A job made a step; the memory is what is resident just now."""

    job: Job
    step: int
    loss: float
    tokens_per_second: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class JobPhase(Event):
    """A job does something other than training now, such as "evaluating"."""

    job: Job
    doing: str


@dataclass(frozen=True, slots=True)
class JobDone(Event):
    """A job ended well, now or (`earlier`) in the comparison that this one resumes."""

    job: Job
    result: Result
    earlier: bool


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """A job failed; the others go on."""

    job: Job
    error: str
