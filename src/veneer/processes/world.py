"""The processes that train together, as one value; a process on its own is a world of one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import TrainingError, VeneerError

T = TypeVar("T")


class LostProcess(TrainingError):
    """An exchange failed, as it does where another process has ended."""


@dataclass
class Sent:
    """Bytes that this process gave to exchanges, by their kind."""

    bytes_of: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, tensor: Tensor) -> None:
        """Count what is exchanged of `tensor`."""
        self.bytes_of[kind] = self.bytes_of.get(kind, 0) + tensor.nbytes

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes_of.values())


@dataclass(frozen=True)
class World:
    """This process among all of a run: `rank` of `size`.

    Every exchange must be made by all processes, in the same order; LostProcess is raised where it
    fails. Sums are SUM and never AVG, which gloo has not in all versions (pytorch#162338).
    Backends: gloo on a CPU, nccl on GPUs.
    """

    rank: int = 0
    size: int = 1
    sent: Sent = field(default_factory=Sent, repr=False, compare=False)

    @classmethod
    def current(cls) -> World:
        """Return the world that torch.distributed knows, or that of one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this process writes what the run leaves on the disk."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, the same bits in each of them."""
        if self.size > 1:
            self.sent.count("sum", tensor)
            with exchange():
                dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, alike in shape, as (size, *shape)."""
        if self.size == 1:
            return tensor[None]
        self.sent.count("gather", tensor)
        flat = tensor.new_empty(self.size * tensor.numel())
        with exchange():
            dist.all_gather(list(flat.chunk(self.size)), tensor.contiguous().view(-1))
        return flat.view(self.size, *tensor.shape)

    def copy(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the process that writes."""
        if self.size > 1:
            self.sent.count("copy", tensor)
            with exchange():
                dist.broadcast(tensor, src=0)

    def share(self, value: T, *, of: int = 0) -> T:
        """Return the value of one process, unless given that which writes, in every process. It is
        pickled, between processes of one run only: nothing from outside is read so."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with exchange():
            dist.broadcast_object_list(values, src=of)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return self.sums(float(flag))[0] > 0

    def sums(self, *numbers: float) -> list[float]:
        """Return the sum of each number over the processes."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.add_up(sums)
        return sums.tolist()

    def most(self, number: int) -> int:
        """Return the greatest number that a process has."""
        return int(self.gather(torch.tensor(number)).max())

    def total(self, work: Callable[[], float], *, exchanges: bool = False) -> float:
        """Do `work` in every process and return the sum of the results.

        Raises in every process what `work` raised in any. exchanges: whether `work` itself waits
        for the other processes. Then what it raises is raised in that process alone, which has to
        end: as soon as it has, LostProcess is raised in the others.
        """
        if exchanges:
            return self.sums(work())[0]
        if self.size == 1:
            return work()
        own, failure = 0.0, None
        try:
            own = work()
        except Exception as error:
            failure = error
        total, failures = self.sums(own, float(failure is not None))
        if failures:
            self._raise(failure)
        return total

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process and return each its own result.

        Raises in every process what `work` raised in any.
        """
        results: list[T] = []

        def append() -> float:
            results.append(work())
            return 0.0

        self.total(append)
        return results[0]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the process that writes while the others wait, and return its result in all.

        Raises in every process what `work` raised.
        """
        if self.size == 1:
            return work()
        outcome: tuple[Any, Exception | None] = (None, None)
        own = None
        if self.writes:
            try:
                outcome = (work(), None)
            except Exception as error:
                own, outcome = error, (None, _portable(error, self.rank))
        result, failure = self.share(outcome)
        if failure is not None:
            raise own or failure
        return result

    @contextmanager
    def leading(self) -> Iterator[None]:
        """In this context the process that writes works, while the others wait in `follow`."""
        try:
            yield
        except Exception as error:
            self.share(_portable(error, self.rank))
            raise
        self.share(None)

    def follow(self) -> None:
        """Wait for the end of `leading`. Raises what was raised there."""
        failure: Exception | None = self.share(None)
        if failure is not None:
            raise failure

    def _raise(self, failure: Exception | None) -> None:
        """Raise the error of the first process that has one, in all; its own where it has one."""
        failed = self.gather(torch.tensor(int(failure is not None))).tolist()
        source = failed.index(1)
        portable = _portable(failure, source) if failure and self.rank == source else None
        error = self.share(portable, of=source)
        assert error is not None
        raise failure or error


@contextmanager
def exchange() -> Iterator[None]:
    """Raise LostProcess where torch.distributed fails."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(f"An exchange with the other processes failed: {error}") from error


def _portable(error: Exception, rank: int) -> Exception:
    """Return an error for other processes: itself, where it is for a person and can be sent."""
    if isinstance(error, VeneerError | OSError):
        try:
            return pickle.loads(pickle.dumps(error))  # noqa: S301, what was pickled here
        except Exception:  # an error with arguments of its own may not be made from a message
            return TrainingError(str(error))
    unexpected = TrainingError(f"Process {rank} ended with {type(error).__name__}: {error}")
    unexpected.exit_code = 1  # as that of the process itself
    return unexpected


ALONE = World()  # one process by itself
