"""vLLM itself, in the environment of its own that `make proof-vllm` sets up."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support.waiting import eventually

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("VENEER_VLLM", ROOT / ".venv-vllm"))
Rows = Sequence[tuple[str | None, Sequence[int]]]  # which adapter goes on from which tokens


MARKS = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (ENVIRONMENT / "bin" / "python").is_file(),
        reason="vLLM is not there; make proof-vllm sets it up",
    ),
]


class Reader:
    """A process with vLLM in it, which carries out one job after another.

    threads: one unless more are asked for, since two that wait for each other lose their turns
    beside other programs.
    """

    def __init__(self, log: Path, *, threads: int = 1) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [ENVIRONMENT / "bin" / "python", ROOT / "tools" / "in_vllm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=_environment(threads),
        )

    def do(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        done = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        if error := done.get("error"):
            self.close()
            raise RuntimeError(f"vLLM: {error}; its own lines are in {self.log}")
        return done

    def close(self) -> None:
        self.process.kill()  # it has nothing to save, and takes its time to end
        self.process.wait()


class Vllm(Reader):
    """An engine over a transformers directory, and adapters that a row of a batch can name."""

    def __init__(self, model: Path, log: Path, *, threads: int = 1, **options: Any) -> None:
        super().__init__(log, threads=threads)
        usual = {"enable_lora": True, "max_model_len": 512, "kv_cache_memory_bytes": 2**28}
        usual |= {"enable_prefix_caching": False, "max_num_seqs": 16, "max_num_batched_tokens": 512}
        self.version = self.do(engine={"model": str(model), **usual, **options})["version"]

    def load(self, name: str, path: Path, **request: Any) -> str | None:
        """Let it read an adapter; return why it did not, in its own words."""
        return self.do(load=str(path), name=name, request=request)["refused"]

    def answer(
        self, rows: Rows, *, new: int, top: int = 5
    ) -> list[tuple[list[int], list[dict[int, float]]]]:
        """Go on greedily, all rows in one call. Return each row's tokens, and for each of them how
        likely the first `top` were, as logarithms."""
        answers = self.do(answer=list(rows), new=new, top=top)["answers"]
        return [(a["tokens"], [dict(step) for step in a["logprobs"]]) for a in answers]

    def decode(self, rows: Rows, *, steps: int) -> tuple[float, list[list[int]]]:
        """Return the milliseconds of a step that gives every row a token, and the tokens."""
        done = self.do(decode=list(rows), steps=steps)
        return done["ms"], done["tokens"]


@contextmanager
def served_by_vllm(model: Path, log: Path) -> Iterator[str]:
    """Let vLLM's server answer over a transformers directory; yield its address. Without adapters:
    on a processor its engine ends where a prompt is scored beside them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [ENVIRONMENT / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64"]
    command += ["--kv-cache-memory-bytes", str(2**28)]
    with log.open("w") as lines:
        server = subprocess.Popen(
            command, stdout=lines, stderr=lines, env=_environment(1), start_new_session=True
        )
        try:
            eventually(lambda: _listens(port) or server.poll() is not None)
            assert server.poll() is None, log.read_text()[-2000:]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _environment(threads: int) -> Mapping[str, str]:
    # Intel's OpenMP, which its package brings, before torch's, as vLLM's page on processors asks.
    # What it then sets for workers (vllm/utils/ompmultiprocessing.py) is set here for one process.
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    bound = {"KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]"}
    return (
        ours
        | (bound if threads > 1 else {})
        | {
            "LD_PRELOAD": ":".join(map(str, ENVIRONMENT.glob("lib/libiomp5.so"))),
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    )
