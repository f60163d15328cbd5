"""How a source in C++ becomes a library: for this machine, when it is first needed (native.py), or
for a kind of processor beforehand, for a wheel (hatch_build.py at the root of the repository).

Without torch, which a machine that builds wheels does not have.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMMON = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class Level:
    """A kind of processor: what a compiler is told of it, and the marks in /proc/cpuinfo of those
    that run the result."""

    name: str
    options: tuple[str, ...]
    features: frozenset[str]


# The sources have intrinsics for AVX512 and its bfloat16 dot products; the rest is the compiler's.
# AMX multiplies whole matrices, which torch does: its processors take the first level.
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_V3 = frozenset(["avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = {  # by what $CXX -dumpmachine begins with, the best first
    "x86_64": (
        Level("avx512bf16", (*_WIDE, "-mavx512bf16"), _V4 | {"avx512_bf16"}),
        Level("avx512", _WIDE, _V4),
        Level("avx2", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Level("neon", ("-march=armv8-a",), frozenset({"asimd"})),),
}
ACTIVATIONS = ("Silu", "Gelu", "GeluTanh", "Relu", "ReluSquared", "QuickGelu")
# Every source with every macro that it is compiled with.
SOURCES = (
    *((source, "") for source in ("native", "decode", "gguf", "published")),
    *(("activation", f"ACTIVATION={activation}") for activation in ACTIVATIONS),
)


def compile_library(command: list[str], source: str, library: Path) -> None:
    """Compile a source by `command`, the compiler and its options. Raises CalledProcessError."""
    compiled = library.with_suffix(".o")
    _run([*command, "-c", str(HERE / f"{source}.cpp"), "-o", str(compiled)])
    # Not linked with -fopenmp, which would bring a runtime of its own: torch has one.
    _run([command[0], "-shared", str(compiled), "-o", str(library)])
    compiled.unlink()


def prebuilt_name(source: str, define: str, level: str) -> str:
    """Return the file name of a library in a wheel, such as activation-Silu-avx2.so."""
    return "-".join(filter(None, (source, define.partition("=")[2], level))) + ".so"


def prebuild(compiler: str, directory: Path, levels: Iterable[Level]) -> None:
    """Compile every source for every level into a directory. Raises CalledProcessError."""

    def build(level: Level, source: str, define: str) -> None:
        defines = [f"-D{define}"] if define else []
        command = [compiler, *COMMON, *level.options, "-fopenmp", *defines]
        compile_library(command, source, directory / prebuilt_name(source, define, level.name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(build, level, *source) for level in levels for source in SOURCES]
        for job in jobs:
            job.result()


def target_of(compiler: str) -> str:
    """Return what a compiler compiles for, such as x86_64-linux-gnu."""
    return _run([compiler, "-dumpmachine"])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
