"""A plugin of pytest that writes down calls of compiled kernels, with all that they read and wrote.

tools/replay_kernels.cpp makes the same calls of libraries for another processor and compares:

    VENEER_RECORD=calls.bin pytest -p support.recorded_kernels tests/kernels

A call is: the library's name; the function's; its arguments, each a kind and 8 bytes; and the
memory behind them. Addresses among numbers, of tables of matrices, are written as places in that
memory.
"""

import os
import struct
from collections import Counter
from ctypes import c_void_p, string_at
from pathlib import Path

import torch

from veneer.kernels import native

CALLS_OF_EACH = 8  # function, the first ones
LARGEST = 1 << 19  # bytes that a call's memory may have
NULL, WHOLE, REAL, ADDRESS = range(4)
EXACT, BFLOAT16, FLOAT32, FLOAT64 = range(4)
DTYPES = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64}
CALLS = Path(os.environ["VENEER_RECORD"])

_storages: dict[int, tuple[torch.UntypedStorage, torch.dtype]] = {}  # by address; kept for a test
_counts: Counter[str] = Counter()
_data_ptr, _original = torch.Tensor.data_ptr, native._kernel


def _noted(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        _storages[storage.data_ptr()] = storage, tensor.dtype
    return _data_ptr(tensor)


def _owner(address: int) -> int | None:
    """Return where the memory begins that an address is in."""
    for base, (storage, _) in _storages.items():
        if base <= address < base + storage.nbytes():
            return base
    return None


class _Memory:
    """The blocks that a call reaches, each with its bytes before and the addresses in it."""

    def __init__(self) -> None:
        self.bases: list[int] = []
        self.before: list[bytes] = []
        self.addresses: list[list[tuple[int, int, int]]] = []  # place, block, offset

    def place(self, address: int) -> tuple[int, int] | None:
        """Return the block of an address and where in it that is; blocks that it names come too."""
        base = _owner(address)
        if base is None:
            return None
        if base not in self.bases:
            self.bases.append(base)
            storage, dtype = _storages[base]
            self.before.append(string_at(base, storage.nbytes()))
            self.addresses.append([])
            block = len(self.bases) - 1
            if dtype == torch.int64:
                numbers = struct.unpack(f"<{storage.nbytes() // 8}q", self.before[block])
                for i, number in enumerate(numbers):
                    if number > 1 << 32 and (at := self.place(number)):
                        self.addresses[block].append((8 * i, *at))
        return self.bases.index(base), address - base

    def size(self) -> int:
        return sum(map(len, self.before))

    def written(self) -> bytes:
        """Return the blocks as they were and as they are now."""
        text = struct.pack("<q", len(self.bases))
        for base, before, addresses in zip(self.bases, self.before, self.addresses, strict=True):
            dtype = DTYPES.get(_storages[base][1], EXACT)
            text += struct.pack("<qqq", dtype, len(before), len(addresses))
            text += before + string_at(base, len(before))
            text += b"".join(struct.pack("<qqq", *at) for at in addresses)
        return text


def _argument(argument: object, memory: _Memory) -> bytes | None:
    """Return an argument as it is written; None for an address that nothing is known of."""
    if isinstance(argument, torch.Tensor):
        argument = c_void_p(argument.data_ptr())
    if argument is None or (isinstance(argument, c_void_p) and not argument.value):
        return struct.pack("<qqq", NULL, 0, 0)
    if isinstance(argument, c_void_p):
        at = memory.place(argument.value or 0)
        return struct.pack("<qqq", ADDRESS, *at) if at else None
    if isinstance(argument, float):
        return struct.pack("<qdq", REAL, argument, 0)
    return struct.pack("<qqq", WHOLE, argument, 0)


def _kernel(symbol: str, source: str, define: str):
    call = _original(symbol, source, define)
    if call is None:
        return None
    library = "-".join(filter(None, (source, define.partition("=")[2])))

    def recorded(*arguments: object) -> None:
        key = f"{library} {symbol}"
        memory = _Memory()
        written = [_argument(argument, memory) for argument in arguments]
        call(*arguments)
        if None in written or memory.size() > LARGEST or _counts[key] >= CALLS_OF_EACH:
            return
        _counts[key] += 1
        head = f"{library}\0{symbol}\0".encode()
        with CALLS.open("ab") as file:
            file.write(struct.pack("<q", len(head)) + head + struct.pack("<q", len(written)))
            file.write(b"".join(filter(None, written)) + memory.written())

    return recorded


_kernel.cache_clear = _original.cache_clear  # type: ignore[attr-defined]


def pytest_configure() -> None:
    CALLS.unlink(missing_ok=True)
    torch.Tensor.data_ptr = _noted  # type: ignore[method-assign]
    native._kernel = _kernel


def pytest_runtest_teardown() -> None:
    _storages.clear()


def pytest_terminal_summary(terminalreporter) -> None:
    functions = f"{len(_counts)} functions in {sum(_counts.values())} calls"
    terminalreporter.write_line(f"recorded {functions}: {CALLS}")
