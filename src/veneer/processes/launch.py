"""Several processes on this machine, started and watched over by torch's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from veneer.errors import TrainingError

RESTARTS = 3  # of all processes, after any of them has died; as torch's own default
AGENT = ("torch.distributed", "torch.multiprocessing")  # whose loggers are the agent's
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(
    count: int,
    work: Callable[[Path], int],
    *,
    on_signal: Callable[[int], None] = lambda number: None,
) -> int:
    """Do `work` in `count` processes and return what the first of them returns.

    work: a function of a module, or a partial of one. It is given a directory by which the
    processes find each other (`start.joined`): they listen on no address but that of this machine.
    on_signal: what to do in this process when the first signal comes; the processes get each.

    Where a process dies, all are started again, up to three times. Raises TrainingError after that.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a server that listens on all addresses
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="veneer-") as place, _quiet_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(place) / "agent"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(place) / "logs")),
            signals_to_handle="SIGQUIT",
        )
        try:
            with _forwarded(on_signal):
                codes = elastic_launch(config, _apart)(work, Path(place))
        except ChildFailedError as error:
            raise TrainingError(_why(error)) from None
        except SignalException as error:
            return 128 + int(error.sigval)
    return codes[0]


def _apart(work: Callable[[Path], int], place: Path) -> int:
    """Work out of reach of the terminal's own signals, which else come once more than sent."""
    parent = os.getppid()
    os.setpgid(0, 0)
    code = work(place)
    if os.getppid() != parent:  # nobody is left who would take the code
        os._exit(code)
    return code


@contextmanager
def _forwarded(on_signal: Callable[[int], None]) -> Iterator[None]:
    """In this context pass signals on to the processes that this one has started."""

    signals: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not signals:
            on_signal(number)
        signals.append(number)
        for child in torch.multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    # nohup lets SIGHUP be ignored, and so it stays.
    heeded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent's own log out of our output: what it has to say, we say in fewer words."""
    names = [n for n in logging.root.manager.loggerDict if n.startswith(AGENT)]
    loggers = [logger for name in names if not (logger := logging.getLogger(name)).disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


def _why(error: ChildFailedError) -> str:
    """Return which process died last, and of what."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    memory = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return (
        f"Process {rank} died again, {how}{memory}: it is not started a {RESTARTS + 1}th time. Go "
        "on from the newest checkpoint by the same command and --resume."
    )
