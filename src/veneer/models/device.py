"""The device that a run computes on: which there is, what it computes well, what it counts.

Everything that differs between CUDA, MPS and XPU is asked of torch by the device, so that no other
module asks for one of them by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels.transfer import PINNED
from veneer.models.device_names import ACCELERATORS, parse_device

CPU = torch.device("cpu")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called `name`, with its number; `auto` is the accelerator where torch finds
    one, and else the processor.

    An accelerator without a number is the current one of its type, which is another in each process
    of a run. Raises ConfigError, with what there is, where there is no such device.
    """
    kind, index = parse_device(str(name))
    available = _accelerator()
    if kind == "cpu" or (kind == "auto" and available is None):
        return CPU
    if available is None or kind not in ("auto", available.type):
        raise ConfigError(f"device is {str(name)!r}, but {_why_none(kind)}")
    if index is None:
        index = torch.accelerator.current_device_index()
    count = torch.accelerator.device_count()
    if index >= count:
        numbers = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(
            f"device is {str(name)!r}, but torch finds {count} {available.type} here: take "
            f"{available.type}:{numbers}, or leave it out."
        )
    return torch.device(available.type, index)


def _accelerator() -> torch.device | None:
    """Return the type of accelerator that there is, None where none is that Veneer knows."""
    available = torch.accelerator.current_accelerator(check_available=True)
    return available if available is not None and available.type in ACCELERATORS else None


def _why_none(kind: str) -> str:
    built_for = torch.accelerator.current_accelerator()
    available = _accelerator()
    there = "cpu" if available is None else f"cpu and {available.type}"
    if built_for is None or built_for.type != kind:
        return (
            f"the installed torch {torch.__version__} is not built for {kind}. It computes on "
            f"{there}: take one of these or auto, or install torch's build for {kind} "
            "(https://pytorch.org/get-started/locally)."
        )
    return (
        f"torch finds no {kind} device: see whether its driver runs and whether the environment "
        f"hides it. There is {there}: take that, or auto."
    )


def device_of_run(name: str, processes: int, *, here: int = 1) -> torch.device:
    """Return the device called `name` of a run in so many processes, of which each has its own.

    here: how many of them are known to be on this machine. Raises ConfigError where there is no
    such device, or not one for each of those.
    """
    device = resolve_device(name)
    if processes > 1 and parse_device(name)[1] is not None:
        raise ConfigError(
            f"device is {name!r}, but {processes} processes take one each: name {device.type} "
            "without a number."
        )
    if processes > 1 and device.type == "mps":
        raise ConfigError(f"{processes} processes cannot share one {device.type}: take device cpu.")
    if device.type != "cpu" and here > (count := torch.accelerator.device_count()):
        raise ConfigError(
            f"{here} processes of this machine take one {device.type} each, but torch finds "
            f"{count}: start no more than that, or take device cpu."
        )
    return device


def use_device(device: torch.device) -> None:
    """Make one of several accelerators the one on which this thread computes, where torch and other
    libraries name none. A new thread begins with the first."""
    if device.type != "cpu" and device.index != torch.accelerator.current_device_index():
        torch.accelerator.set_device_index(device)


def device_name(device: torch.device) -> str:
    """Return what a person calls the device, such as "NVIDIA H100 80GB HBM3"."""
    ask = getattr(_module(device), "get_device_name", None)
    return str(device) if ask is None else str(ask(device))


def computes_bf16(device: torch.device, *, slowly: bool = False) -> bool:
    """Return whether an accelerator multiplies bfloat16 itself; or at all, `slowly`."""
    ask = getattr(_module(device), "is_bf16_supported", None)
    if ask is not None:
        with torch.accelerator.device_index(device.index):  # of which it speaks
            return bool(ask(including_emulation=slowly))
    return torch.bfloat16 in torch.accelerator.get_device_capability(device)["supported_dtypes"]


def has_memory_of_its_own(device: torch.device) -> bool:
    """Return whether a device computes in other memory than the processor's."""
    return device.type in PINNED


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take of the memory that a device has of its own,
    with those that torch keeps and no tensor has; None where they are not known."""
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except RuntimeError:  # some of Intel's do not say
        return None
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free) + kept


def begin_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here on."""
    if _counts_peaks(device):
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes of an accelerator that tensors took since `begin_peak`; None for a
    processor, and for an accelerator that does not count them."""
    return int(torch.accelerator.max_memory_allocated(device)) if _counts_peaks(device) else None


def _counts_peaks(device: torch.device) -> bool:
    return device.type != "cpu" and hasattr(_module(device), "max_memory_allocated")


def synchronize(device: torch.device) -> None:
    """Return when the device has done all that it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> Tensor:
    """Return the state of a device's random numbers, on the processor."""
    return torch.get_rng_state() if device.type == "cpu" else _module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Have a device go on with the random numbers of a state."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        _module(device).set_rng_state(state, device)


class RandomNumbers:
    """The random numbers of one run among several, on the processor and the device of the run.

    generator: on the processor. What a device has of its own goes on from what it is now.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.generator = torch.Generator() if generator is None else generator
        self._state = None if device.type == "cpu" else random_state(device)
        self._device = device

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Let torch draw these numbers while the context lasts, and then go on with its own."""
        before = {device: random_state(device) for device in {CPU, self._device}}
        torch.set_rng_state(self.generator.get_state())
        if self._state is not None:
            set_random_state(self._device, self._state)
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            if self._state is not None:
                self._state = random_state(self._device)
            for device, state in before.items():
                set_random_state(device, state)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
