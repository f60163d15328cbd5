"""Findings on an adapter, and the rules that several runtimes share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from veneer.errors import listed
from veneer.formats.names import FormatName
from veneer.formats.runtimes.facts import Facts

Verdict = Literal["ok", "needs", "no"]


@dataclass(frozen=True)
class Finding:
    """A verdict on one thing: ok; needs: only with `do`; or no: `do` instead."""

    verdict: Verdict
    what: str
    says: str
    do: str = ""


Rule = Callable[[Facts], Iterator[Finding]]


@dataclass(frozen=True)
class Runtime:
    """A program that loads adapters: the formats it reads, the one to convert to, its rules."""

    title: str  # with the version that was read
    read_in: str  # its files
    formats: tuple[FormatName, ...]
    rules: dict[FormatName, tuple[Rule, ...]]
    run: str = ""  # where it is run too, if it is


MERGE = "merge it: veneer merge BASE ADAPTER OUT"
UNIFORM = "veneer convert ADAPTER --to peft OUT --rank {rank}"
TO_GGUF = "veneer convert ADAPTER --to gguf OUT.gguf --base BASE"
FACTORS = (r"lora_[AB]\.weight", r"lora_embedding_[AB]")
# The linear layers of a Llama-like block, the only ones that some runtimes adapt.
LLAMA_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def setting(name: str, says: str, do: str = MERGE) -> Rule:
    """A setting that must be off; `says`: what happens if it is on."""

    def rule(facts: Facts) -> Iterator[Finding]:
        if facts.config.get(name):
            yield Finding("no", name, says, do.format(rank=facts.highest))

    return rule


def invocation(says: str) -> Rule:
    """An adapter that acts from an invocation on, as no merged weight does."""
    return setting("alora_invocation_tokens", says, "serve it by veneer serve, PEFT, llama-server")


def bias(says: str) -> Rule:
    """Trained biases: any setting of `bias` but none."""

    def rule(facts: Facts) -> Iterator[Finding]:
        if (biases := facts.config.get("bias", "none")) != "none":
            yield Finding("no", f"bias={biases}", says, MERGE)

    return rule


def keys(known: tuple[str, ...], says: str) -> Rule:
    """The names of tensors that the runtime knows, as patterns of their ends."""
    pattern = re.compile(rf"(?:.*\.)?(?:{'|'.join(known)})")

    def rule(facts: Facts) -> Iterator[Finding]:
        if strange := [key for key in facts.shapes if not pattern.fullmatch(key)]:
            yield Finding("no", "key names", f"{says}: {listed(strange)}", MERGE)

    return rule


def always(verdict: Verdict, what: str, says: str, do: str = "") -> Rule:
    """What holds for every adapter."""

    def rule(facts: Facts) -> Iterator[Finding]:
        yield Finding(verdict, what, says, do.format(rank=facts.highest))

    return rule


def applied(*settings: str) -> Rule:
    """Settings that other runtimes ignore and this one obeys."""

    def rule(facts: Facts) -> Iterator[Finding]:
        if present := [name for name in settings if facts.config.get(name)]:
            yield Finding("ok", ", ".join(present), "applied, as in PEFT")

    return rule


def lora_only(facts: Facts) -> Iterator[Finding]:
    """PEFT's type of adapter: anything but LORA is another method."""
    if (kind := facts.config.get("peft_type", "LORA")) != "LORA":
        yield Finding("no", "peft_type", f"{kind}, and LORA alone is read", "serve it with PEFT")
