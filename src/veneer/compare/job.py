"""What a process of its own is to do, and what it measured: two values that go through JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from veneer.compare.labels import Label
from veneer.errors import ConfigError, differences, joined
from veneer.files import read_json, write_json

Kind = Literal["base", "trial", "run"]
# How the names of their files end, and that of the directory into which a task's own files are
# written to measure their size.
JOB, RESULT, TASK_FILES = ".job.json", ".json", ".kept"


@dataclass(frozen=True)
class Job:
    """One process: the base alone, a short trial, or a whole run. It is also its own identity.

    files: a hash of what each file held when the comparison began
    """

    name: str
    kind: Kind
    label: Label
    model: str
    data: str
    test: str | None
    general: str | None
    files: dict[str, str]
    test_rows: int | None
    max_new_tokens: int
    eval_rows: int | None
    limit: int | None
    max_length: int
    tokens_per_step: int | None  # None for the base alone, which chooses them for all
    device: str
    dtype: str
    split_seed: int
    seed: int
    steps: int
    lr: float

    def settings(self) -> dict[str, Any]:
        """Return everything about the job as plain values."""
        settings = asdict(self)
        label = settings.pop("label")
        # Neither words about a label nor the rate that it starts from decide what its run does.
        names = ("method", "lora", "bits", "lora_plus_ratio")
        return settings | {"label": {name: label[name] for name in names}}

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        settings = read_json(path)
        label = Label(settings["name"], "", **settings.pop("label"))
        return cls(**settings, label=label)

    def write(self, path: Path) -> None:
        """Write the job for the process that does it."""
        write_json(path, self.settings())


@dataclass(frozen=True)
class Result:
    """What a job measured. Sizes are in bytes, losses in nats a token.

    The base alone has nothing that only training gives, and a trial little more than its loss.
    """

    base: dict[str, str]  # its fingerprint
    base_parameters: int
    dtype: str
    rows: int  # to train on
    held_out: int
    tokens_a_step: float  # mean of the first epoch
    eval_loss: float  # of a trial that diverged, infinite
    hidden_size: int | None = None
    tokens_per_step: int = 0  # at most
    steps: int = 0  # that a run of these rows chooses
    device: str = "cpu"
    general_loss: float | None = None
    exact: float | None = None  # per cent of the answers that are right to the word
    bleu: float | None = None
    signature: str | None = None  # sacrebleu's, of how BLEU was computed
    answers: list[str] = field(default_factory=list)
    trained: int = 0
    tokens: int = 0
    seconds: float = 0.0
    seconds_a_step: float = 0.0
    tokens_per_second: float = 0.0
    train_loss: float | None = None  # mean of the last tenth of the steps
    losses: list[float] = field(default_factory=list)
    together: int = 1  # runs that trained in the same passes, whose times and memory are of all
    skipped: int = 0  # steps whose loss or gradient was not finite, and that changed nothing
    peak: int | None = None
    kept: int | None = None  # size of the files that the task alone needs
    base_unchanged: bool | None = None
    swappable: bool | None = None
    notices: list[str] = field(default_factory=list)


def write_result(path: Path, job: Job, result: Result) -> None:
    """Write what a job measured, with the job."""
    write_json(path, {"job": job.settings(), "result": asdict(result)})


def read_result(path: Path, job: Job) -> Result | None:
    """Return what this very job measured, or None where it never ended.

    Raises ConfigError, which lists the differences, where the file has another job's result.
    """
    if not path.exists():
        return None
    written = read_json(path)
    then = {"device": "auto", **written["job"]}  # earlier versions wrote no device
    if differing := differences(then, job.settings()):
        raise ConfigError(
            f"{path} belongs to another comparison: {joined(differing)}. Resume with the same "
            "settings, or start anew by --force or another --out."
        )
    try:
        return Result(**written["result"])
    except TypeError as error:
        raise ConfigError(
            f"{path} was written by another version of Veneer; start anew by --force."
        ) from error
