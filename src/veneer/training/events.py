"""What happens in a run, as values that its loop yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from veneer.errors import VeneerError

if TYPE_CHECKING:
    from veneer.adapter.certify import MergeReport
    from veneer.adapter.report import QuantizedReport, TargetReport
    from veneer.data.columns import Summary
    from veneer.data.sources import Data
    from veneer.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that happens in a run."""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something that a person should know: a fallback, or a choice that was made for them."""

    text: str


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """The memory that each of the run's processes will need, and the bytes that it has and may
    take, or None where they are not known."""

    plan: Plan
    available: int | None
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Space(Event):
    """The bytes that the run needs on the disk at most, by what they are for, and how many are free
    there."""

    needed: Mapping[str, int]
    free: int


@dataclass(frozen=True, slots=True)
class Measured(Event):
    """The most memory that the run took, in bytes, beside what was planned."""

    planned: int
    peak: int


@dataclass(frozen=True, slots=True)
class Encoding(Event):
    """Rows are encoded, or their words counted, by all cores: how many rows and bytes so far.

    total: bytes of all, None where that is not known; waiting: another process does it
    """

    what: str
    rows: int
    bytes: int
    total: int | None
    waiting: bool


@dataclass(frozen=True, slots=True)
class DataReady(Event):
    """The rows are read and encoded; `example` is one of them, in pieces, trained or not.

    eval_data: where the held-out rows are from, None where they are some of the rows.
    """

    summary: Summary
    held_out: Summary | None
    skipped: int
    example: list[tuple[str, bool]]
    eval_data: Data | None = None


@dataclass(frozen=True, slots=True)
class ModelReady(Event):
    """The base is loaded and the adapter attached."""

    targets: TargetReport
    new_tokens: tuple[str, ...]
    dtype: str
    quantized: QuantizedReport | None


@dataclass(frozen=True, slots=True)
class Started(Event):
    """Training begins, or goes on after `done` steps."""

    steps: int
    done: int


@dataclass(frozen=True, slots=True)
class Step(Event):
    """One optimizer step. `loss` is the mean over its label tokens, or what its objective takes the
    mean of; `tokens` are real ones. metrics: what the objective measures beside."""

    step: int
    loss: float
    lr: float
    tokens: int
    label_tokens: int
    seconds: float
    rss_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skipped(Event):
    """A step that was left out, since loss or gradient was not finite, or the loss stood out; the
    weights are as they were before it."""

    step: int
    rows: tuple[str, ...]
    why: str = "loss or gradient not finite"


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """Held-out rows were measured, at step 0 before the first: the mean loss over label tokens, or
    by the run's objective, where there is no perplexity; and what that measures beside. Of prompts
    it is the mean reward of answers to them, with its sign turned, for the least is best; or how
    far the teacher is."""

    step: int
    eval_loss: float
    perplexity: float | None
    best: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpointed(Event):
    """The run's state is on the disk."""

    step: int
    place: Path


@dataclass(frozen=True, slots=True)
class Stopped(Event):
    """Training ended before its last step; `reason` is "interrupted" or "patience"."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """An error ended a run that shares its passes with others, which go on."""

    error: Exception

    @property
    def why(self) -> str:
        """The error's words, behind its kind where they were not written for whoever trains."""
        expected = isinstance(self.error, VeneerError | OSError)
        return str(self.error) if expected else f"{type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """All of a run that shares its passes with others is done: nothing more comes of it."""


@dataclass(frozen=True, slots=True)
class Verdict(Event):
    """What became of the training, as its losses have it; `text` says what to do next."""

    kind: Literal["learnt", "hardly learnt", "overfitted", "diverged"]
    text: str


@dataclass(frozen=True, slots=True)
class Trained(Event):
    """Training ended; the model holds the weights of step `weights_of`, 0 for those before it."""

    step: int
    weights_of: int


@dataclass(frozen=True, slots=True)
class Doing(Event):
    """Work begins that may take minutes and says nothing until its end."""

    what: str


@dataclass(frozen=True, slots=True)
class Merged(Event):
    """The adapter is merged; the report says how the merged model differs."""

    report: MergeReport


@dataclass(frozen=True, slots=True)
class Written(Event):
    """A result is on the disk."""

    what: str
    place: Path
    bytes: int
