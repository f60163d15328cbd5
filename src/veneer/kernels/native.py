"""The kernels in C++, called through ctypes: the elementwise operations of a training step
(native.cpp, activation.cpp), and a whole step of many rows (decode.cpp).

They come in the wheel (prebuilt.py), or are compiled once for this processor; the user's cache
keeps the result. Each caller has the formula in torch beside it, for other devices, other dtypes,
and where there is neither.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from veneer.kernels import prebuilt
from veneer.kernels.compiling import COMMON, HERE, compile_library

COMPILERS = ("g++", "c++", "clang++")
# The first that this compiler and processor take: x86, ARM, anything.
TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ())
MARKS = ("flags", "model name", "Features", "CPU ")  # lines of /proc/cpuinfo, on x86 and ARM
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def kernel(
    name: str, like: Tensor, *others: Tensor | None, source: str = "native", define: str = ""
) -> Callable[..., None] | None:
    """Return a compiled function for tensors such as `like`, or None where torch has to do it, as
    where others that have to share its dtype do not.

    It takes contiguous tensors, integers, floats, None (a null pointer) and what `strided` returns.
    source, define: as `library_of` takes them.
    """
    if like.device.type != "cpu" or like.dtype not in NAMES:
        return None
    if any(other is not None and other.dtype != like.dtype for other in others):
        return None
    return _kernel(f"{name}_{NAMES[like.dtype]}", source, define)


@functools.cache
def _kernel(symbol: str, source: str, define: str) -> Callable[..., None] | None:
    library, _ = library_of(source, define)
    if library is None:
        return None
    function = getattr(library, symbol)
    function.restype = None

    def call(*arguments: Tensor | ctypes.c_void_p | float | None) -> None:
        if function.argtypes is None:
            function.argtypes = [_c_type(argument) for argument in arguments]
        function(*map(_address, arguments))

    return call


def adjacent(x: Tensor) -> Tensor:
    """Return x, copied unless the numbers of each row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(x: Tensor | None) -> tuple[ctypes.c_void_p | int | None, ...]:
    """Return the arguments for a tensor whose rows may lie apart: its address and every stride but
    the last, which has to be 1. None is a matrix that is not there."""
    if x is None:
        return None, 0
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"a compiled kernel takes no rows of stride {x.stride(-1)}")
    return ctypes.c_void_p(x.data_ptr()), *x.stride()[:-1]


def _c_type(argument: object) -> type:
    """Return the type of an argument, which is the same at each call of a function."""
    if isinstance(argument, float):
        return ctypes.c_double
    # None is a null pointer, and so is not told from a number by its own.
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p


def _address(argument: Tensor | ctypes.c_void_p | float | None) -> object:
    """Return a tensor's address, and anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    if not argument.is_contiguous():
        raise ValueError(f"a compiled kernel takes no tensor of strides {argument.stride()}")
    address = argument.data_ptr()
    if not address and argument.numel():
        raise ValueError("a compiled kernel takes no tensor whose numbers are in other processes")
    return address


def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library of native.cpp as `library_of` does."""
    return library_of("native")


@functools.cache
def library_of(source: str, define: str = "") -> tuple[ctypes.CDLL | None, str]:
    """Return a source's library, of the wheel or compiled, or None; and what is wrong, or "".

    define: a macro that the source is compiled with, as NAME=VALUE.
    """
    library, _ = _prebuilt(source, define)
    if library is not None:
        return library, ""
    defines = (f"-D{define}",) if define else ()
    if os.name != "posix":
        return None, "the compiled kernels are for Linux and macOS"
    problem = f"no C++ compiler was found ({', '.join(COMPILERS)} or $CXX)"
    # The threads must be torch's own: a second OpenMP runtime would fight it for the cores.
    threads = [("-fopenmp",)] if hasattr(ctypes.CDLL(None), "GOMP_parallel") else []
    for compiler in filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        for parallel in (*threads, ("-fopenmp-simd",)):
            for tuning in TUNINGS:
                try:
                    options = (*tuning, *parallel, *defines)
                    library = ctypes.CDLL(str(_built(source, compiler, options)))
                except subprocess.CalledProcessError as error:
                    lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
                    problem = f"{compiler} failed: {lines[0]}"
                except OSError as error:
                    problem = str(error)
                else:
                    one_core = "the compiled kernels use one core, since torch has no OpenMP here"
                    return library, "" if parallel in threads else one_core
    return None, problem


def why_compiled() -> str:
    """Return why sources are compiled though this wheel has libraries, "" where that is not so."""
    return _prebuilt("native", "")[1]


@functools.cache
def _prebuilt(source: str, define: str) -> tuple[ctypes.CDLL | None, str]:
    """Return a source's library in the wheel, or None; and why none of those in the wheel is it."""
    path = prebuilt.path_of(source, define)
    if path is None:
        return None, prebuilt.level_here()[1]
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:  # as where torch has another OpenMP runtime than GNU's
        return None, str(error)


def _built(source: str, compiler: str, options: tuple[str, ...]) -> Path:
    """Return the shared library, from the cache or compiled anew."""
    command, code = [compiler, *COMMON, *options], HERE / f"{source}.cpp"
    key = hashlib.sha256()
    texts = (path.read_text(encoding="utf-8") for path in (*sorted(HERE.glob("*.h")), code))
    for text in (*texts, *command, _processor()):
        key.update(text.encode() + b"\0")
    for directory in _caches():
        library = directory / f"kernels-{key.hexdigest()[:20]}.so"
        if library.exists():
            return library
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                shared = Path(scratch) / "kernels.so"
                compile_library(command, source, shared)
                shared.replace(library)
        except OSError:
            continue
        return library
    raise OSError("there is no folder to compile in")


def _caches() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    yield Path(home) / "veneer"
    yield Path(tempfile.mkdtemp(prefix="veneer-"))  # private: what is in it is executed


def _processor() -> str:
    """Return a description that tells this processor from others that share the cache."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() + platform.machine()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(MARKS)}))
