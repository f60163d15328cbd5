"""Blocks of rows through as many processes as there are cores."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

from veneer.data.blocks import Block
from veneer.data.chunk import About
from veneer.data.worker import Task
from veneer.errors import DataError
from veneer.machine import cores


def done_by_all_cores(
    task: Task, blocks: Iterator[Block]
) -> Iterator[tuple[int, int, About | Counter[str]]]:
    """Yield, in any order, each block's number, its bytes of lines, and what was done with it.

    Raises what the reading of a block or a process raised.
    """
    results: SimpleQueue[Any] = SimpleQueue()
    lock, stopping = threading.Lock(), threading.Event()

    def next_block() -> Block | None:
        with lock:
            return None if stopping.is_set() else next(blocks, None)

    def serve(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(task, process.stdin)
            while (block := next_block()) is not None:
                pickle.dump(block, process.stdin)
                process.stdin.flush()
                results.put(pickle.load(process.stdout))  # noqa: S301, of our own process
            process.stdin.close()
            results.put(None)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = process.wait()
            results.put(
                DataError(
                    f"A process that encodes rows ended with code {code}"
                    + (", as where memory ends" if code == -9 else "")
                    + ". What it had finished stays; start the same command again."
                )
            )
        except Exception as error:
            results.put(error)

    processes = [_started() for _ in range(cores().usable)]
    threads = [threading.Thread(target=serve, args=(p,), daemon=True) for p in processes]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, Exception):
                raise result
            elif isinstance(result[2], Exception):
                raise result[2]
            else:
                yield result
    finally:
        stopping.set()
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: no module comes from where the user happens to be.
        [sys.executable, "-P", "-m", "veneer.data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Each process is busy with a core of its own.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        # Ctrl-C reaches this process alone, which then ends the others.
        process_group=0,
    )
