"""A user's reward function, run in a process of its own that can be ended when it hangs."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from veneer.errors import ConfigError
from veneer.rewards.judged import Answered, RewardFault

START_SECONDS = 120.0  # for a module that imports much


class Function:
    """The reward that MODULE:FUNCTION or FILE.py:FUNCTION computes, in a process of its own.

    The function is given, by name, what it takes of `prompt`, `completion`, `messages` and
    `references`. seconds: that one call may take; then the process is ended, and the next call
    starts another. Raises ConfigError where the function cannot be imported or called so.
    """

    def __init__(self, spec: str, *, seconds: float = 10.0) -> None:
        self.spec, self.seconds = spec, seconds
        self.name = spec.rpartition(":")[2]
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._start()

    def __call__(self, answer: Answered) -> float:
        if self._process is None:
            self._start()
        message = {
            "prompt": answer.prompt,
            "completion": answer.text,
            "messages": [dict(turn) for turn in answer.messages],
            "references": list(answer.references),
        }
        reply = self._ask(json.dumps(message).encode() + b"\n", self.seconds)
        if "raised" in reply:
            raise RewardFault("raised", f"{reply['raised']}.")
        return float(reply["reward"])

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        process, self._process, self._unread = self._process, None, b""
        with suppress(ProcessLookupError, PermissionError):  # of a group that has ended
            os.killpg(process.pid, signal.SIGKILL)  # with what the function may have started
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        process.wait()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "veneer.rewards.worker", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            reply = self._ask(b"", START_SECONDS)
        except RewardFault as fault:
            raise ConfigError(f"The reward {self.spec} cannot be used: {fault}") from fault
        if "unusable" in reply:
            self.close()
            raise ConfigError(f"The reward {self.spec} cannot be used: {reply['unusable']}")

    def _ask(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Send a message and return the reply. Raises RewardFault where none comes in time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(message)
            process.stdin.flush()
            line = self._line(seconds)
        except TimeoutError as error:  # which is an OSError too
            self.close()
            raise RewardFault("timed out", f"no reward came within {seconds:g} s.") from error
        except OSError:
            line = b""
        except BaseException:  # Ctrl-C, which does not reach the process itself
            self.close()
            raise
        if not line:
            self.close()
            raise RewardFault("raised", f"its process ended by itself ({process.returncode}).")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _line(self, seconds: float) -> bytes:
        """Return the next line, empty at the end. Raises TimeoutError."""
        assert self._process is not None
        pipe: Any = self._process.stdout
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                piece = os.read(pipe.fileno(), 65536)
                if not piece:
                    return b""
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line
