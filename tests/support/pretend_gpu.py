"""A GPU for tests where there is none: fake tensors on cuda:0, mps:0 or xpu:0, in a process of
their own.

Fake tensors have shapes, dtypes and devices and no numbers, so that a step on a GPU runs here in
all but its arithmetic. A torch without a card allows them, whether it was built for CUDA or not,
once a guard that does nothing is loaded (pretend_gpu.cpp). It must be there before torch is, and
nothing else in a process with it would be as it was: so a whole table of cases runs in one more.

A module of cases is tests/gpu/<name>_cases.py. Its `CASES`, and `SLOW_CASES` where it has any, are
functions by name that return what JSON can say. In them `support.fake_card` has what they need;
tests/gpu/conftest.py gives their results to tests:

    @pytest.mark.parametrize("case", training_cases.CASES)
    def test_...(case, pretend):
        assert pretend("training_cases", case)["synchronisations"] == []
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("g++", "c++", "clang++")
BELOW = ("libc10.so", "libtorch_cpu.so")  # what the guard's library needs, in this order
MOST_SECONDS = 5400  # of a table of all models; fast ones take a few
DEVICE = "VENEER_PRETEND_DEVICE"  # the environment variable that says which it is there


class NoPretendGPU(Exception):
    """Why there can be no pretend GPU here."""


def library(device: str = "cuda") -> Path | None:
    """Return the guard's library, built once for a machine and a torch; None where torch has a
    guard of its own, because it was built for CUDA and there is a card.

    Raises NoPretendGPU with a reason to skip.
    """
    torch = _torch()
    is_for_cuda = (torch / "lib" / "libtorch_cuda.so").exists()
    if is_for_cuda and device == "cuda" and Path("/dev/nvidia0").exists():
        return None
    if is_for_cuda and device != "cuda":
        raise NoPretendGPU(f"this torch is built for CUDA, beside which it takes no {device}")
    if not sys.platform.startswith("linux"):
        raise NoPretendGPU("the pretend GPU is built on Linux only")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise NoPretendGPU(f"no C++ compiler was found ({', '.join(COMPILERS)} or $CXX)")
    if not (torch / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").exists():
        raise NoPretendGPU(f"torch's headers are missing: there are none in {torch / 'include'}")
    version = importlib.metadata.version("torch")
    what = f"{version} {torch} {compiler} {device} {SOURCE.read_text()}"
    key = hashlib.sha256(what.encode()).hexdigest()
    place = Path(tempfile.gettempdir()) / f"veneer-pretend-gpu-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise NoPretendGPU(f"{place} belongs to somebody else")
    built = place / f"{key[:20]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            shared = Path(scratch) / "guard.so"
            command = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", str(SOURCE)]
            command += [f"-DKIND={device.upper()}", f"-DFOR_{device.upper()}"]
            command += [f"-I{torch / 'include'}", "-o", str(shared)]
            command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            shared.replace(built)
    return built


def run(
    modules: Sequence[str], table: str, device: str = "cuda"
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run the cases that `modules` have in their `table`, and return by module and name what came
    of each: its "result" or its "error", a traceback. A module that cannot be imported has one
    error, under the name "". Raises NoPretendGPU."""
    guard = library(device)
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, "-m", __name__, str(guard or ""), str(results), table, *modules]
        environment = {
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            **{"HF_HUB_OFFLINE": "1", DEVICE: device},
        }
        done = subprocess.run(
            command,
            **{"env": environment, "cwd": scratch, "timeout": MOST_SECONDS},
            **{"capture_output": True, "text": True},
        )
        if not results.exists():
            raise AssertionError(
                f"The process with the pretend GPU ended with {done.returncode}:\n"
                f"{done.stderr[-5000:]}"
            )
        return json.loads(results.read_text())


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _main(guard: str, results: str, table: str, *modules: str) -> None:
    assert "torch" not in sys.modules
    if guard:
        for name in BELOW:
            ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(guard, ctypes.RTLD_GLOBAL)
        importlib.import_module("torch")
        loaded.guard_again()
    outcomes: dict[str, dict[str, dict[str, Any]]] = {}
    for name in modules:
        outcomes[name] = {}
        try:
            cases = getattr(importlib.import_module(name), table, {})
        except Exception:
            outcomes[name][""] = {"error": traceback.format_exc()}
            continue
        for case, function in cases.items():
            start = time.perf_counter()
            try:
                outcome = {"result": function()}
            except Exception:
                outcome = {"error": traceback.format_exc()}
            outcomes[name][case] = outcome | {"seconds": time.perf_counter() - start}
    Path(results).write_text(json.dumps(outcomes))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch waits without an end for the streams of a card, whose threads are gone


if __name__ == "__main__":
    _main(*sys.argv[1:])
