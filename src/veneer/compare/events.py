"""What a comparison tells whoever follows it."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.compare.job import Job, Result
from veneer.training.events import Event


@dataclass(frozen=True, slots=True)
class Laid(Event):
    """The comparison is laid out: the names of its runs, in order, and the seeds of each."""

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
    """A job goes on to something else than training."""

    job: Job
    doing: str


@dataclass(frozen=True, slots=True)
class JobDone(Event):
    """A job ended well, now or (`kept`) in a comparison that this one goes on with."""

    job: Job
    result: Result
    kept: bool


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """A job came to nothing; the others go on."""

    job: Job
    error: str
