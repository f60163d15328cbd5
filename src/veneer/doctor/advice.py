"""What will be fast here and what not, why, and what to do: sentences from facts and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor
from typing import Literal

from veneer.doctor.facts import Facts
from veneer.doctor.measure import Figures, Speed
from veneer.machine import MULTIPLY_BF16

ALIKE = 1.15  # times as fast: less is what a measurement of a second cannot tell apart
BUSY = 0.3  # of the cores; more load than that makes figures lower than they are
LITTLE_DISK = 5e9  # bytes: checkpoints and a merged model of 1 B parameters take about as much
# Held by these, products take older instructions than there are.
HOLD_BACK = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
CUDA_BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Remark:
    """A sentence: what is fast, what is slow, or what to do."""

    kind: Literal["fast", "slow", "do"]
    text: str


def remarks(facts: Facts, figures: Figures) -> list[Remark]:
    """Return all that follows from the facts and the figures, what to do last."""
    ways = (_products, _card, _kernels, _cores, _disk, _held_back)
    every = [remark for way in ways for remark in way(facts, figures)]
    order = ("fast", "slow", "do")
    return sorted(every, key=lambda remark: order.index(remark.kind))


def times(speed: Speed) -> float:
    """Return how many times as fast as in float32 products in bf16 are."""
    return speed.bf16 / speed.float32


def _products(facts: Facts, figures: Figures) -> Iterator[Remark]:
    ratio = times(figures.products)
    if facts.processor.multiplies_bf16:
        units = ", ".join(unit for unit in facts.processor.units if unit in MULTIPLY_BF16)
        why = f"the processor has {units}"
    else:
        why = "the processor has no instructions for bf16"
    if ratio >= ALIKE:
        yield Remark("fast", f"bf16 products: {ratio:.1f} times as fast as float32's, for {why}.")
        advice = "Leave --dtype auto, which takes bf16: faster here, and half the memory."
    elif ratio > 1 / ALIKE:
        yield Remark("fast", f"bf16 products are about as fast as float32's; {why}.")
        advice = "Take --dtype bf16: as fast as float32 here, and a base in half the memory."
    else:
        yield Remark(
            "slow", f"bf16 products: {1 / ratio:.1f} times as slow as float32's, for {why}."
        )
        advice = (
            "Leave --dtype auto, which takes float32 on this processor. Where the base is too "
            "large in it, try --bits 8 or 4 first, then --dtype bf16: slower, half the memory."
        )
    if figures.card is None:
        yield Remark("do", advice)


def _card(facts: Facts, figures: Figures) -> Iterator[Remark]:
    card = figures.card
    if card is not None:
        speed = max(card.products.float32, card.products.bf16)
        here = max(figures.products.float32, figures.products.bf16)
        yield Remark("fast", f"{card.name}: products {speed / here:,.0f} times as fast as here.")
        yield Remark("do", f"Leave --device auto and --dtype auto: the card, {figures.dtype}.")
        if card.slower:
            yield Remark("slow", f"{card.slower}.")
            yield Remark("do", "On the card: pip install 'veneer[gpu]'.")
    elif facts.driver and not figures.cuda:
        yield Remark("slow", "There is a driver for an NVIDIA card, but this torch has no CUDA.")
        yield Remark("do", f"Install torch's build for CUDA: {CUDA_BUILDS}.")
    elif facts.driver:
        yield Remark("slow", "There is a driver for an NVIDIA card, but torch finds no card.")
        yield Remark("do", "See whether nvidia-smi and CUDA_VISIBLE_DEVICES show the card.")
    else:
        yield Remark("slow", "No GPU: everything is computed by the processor.")


def _kernels(_: Facts, figures: Figures) -> Iterator[Remark]:
    if not figures.native:
        yield Remark("fast", "Norms, activations, attention and loss: compiled for this processor.")
        return
    yield Remark("slow", f"Norms, activations, attention and loss, for {figures.native}.")
    if not figures.compiler:
        yield Remark("do", "Install a C++ compiler, such as g++ (apt-get install g++).")


def _cores(facts: Facts, figures: Figures) -> Iterator[Remark]:
    cores, threads = facts.cores, figures.threads
    if cores.allowed < cores.machine:
        yield Remark(
            "slow", f"This process may run on {cores.allowed} of {cores.machine} cores (affinity)."
        )
    if cores.quota is not None and cores.quota < cores.allowed:
        yield Remark(
            "slow", f"Its control group gives it {cores.quota:g} of {cores.allowed} cores' time."
        )
    if threads > cores.usable:
        whole = max(1, floor(cores.quota)) if cores.quota is not None else cores.usable
        yield Remark(
            "do",
            f"export OMP_NUM_THREADS={whole}: {threads} threads wait for each other on what is "
            "given of the cores.",
        )
    elif threads < cores.usable:
        why = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in facts.environment else "torch"
        yield Remark(
            "do",
            f"{why} takes {threads} of {cores.usable} cores: unset OMP_NUM_THREADS, or set it to "
            f"{cores.usable}, where nothing else needs the others.",
        )
    if facts.load is not None and facts.load > BUSY * cores.usable:
        yield Remark(
            "slow",
            f"Other programs compute (a load of {facts.load:.1f} on {cores.usable} cores): the "
            "figures are lower than on an idle machine.",
        )


def _disk(facts: Facts, figures: Figures) -> Iterator[Remark]:
    if figures.written is None:
        yield Remark("do", f"{facts.place} cannot be written to: take --out elsewhere.")
    elif facts.disk_free < LITTLE_DISK:
        yield Remark(
            "do",
            f"{facts.disk_free / 1e9:.1f} GB of disk are free here: take --keep 1, or --out "
            "on another disk.",
        )
    if figures.read is not None:
        yield Remark(
            "fast" if figures.read > 1e9 else "slow",
            f"A base that stays on the disk (veneer quantize, --offload disk): each GB of it takes "
            f"{1e9 / figures.read:.1f} s to read, once a pass.",
        )


def _held_back(facts: Facts, _: Figures) -> Iterator[Remark]:
    for name in HOLD_BACK:
        if name in facts.environment:
            yield Remark(
                "do",
                f"Unset {name}, which is {facts.environment[name]}: products keep to older "
                "instructions.",
            )
