"""Text Generation Inference, read in 3: PEFT's directory, but only Llama-like layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import (
    LLAMA_NAMES,
    MERGE,
    UNIFORM,
    Finding,
    Runtime,
    always,
    applied,
    bias,
    invocation,
    lora_only,
    setting,
)


def layers(facts: Facts) -> Iterator[Finding]:
    """Seven layers of a Llama-like block, each kind in every block or not at all."""
    if others := sorted(facts.names - LLAMA_NAMES):
        yield Finding("no", "layers", f"ignored without a word: {listed(others)}", MERGE)
    blocks: dict[str, set[int]] = {}
    for path in facts.ranks:
        if match := re.search(r"\.(\d+)\..*?([^.]+)$", path):
            blocks.setdefault(match[2], set()).add(int(match[1]))
    last = max((max(own) for own in blocks.values()), default=-1)
    partly = [name for name, own in blocks.items() if own != set(range(last + 1))]
    if partly:
        yield Finding(
            "no",
            "blocks",
            f"{listed(sorted(partly))} are not adapted in every block, and then in none",
            MERGE,
        )


def rank(facts: Facts) -> Iterator[Finding]:
    """pad_rank, after which prepare_weights divides alpha by the padded rank."""
    rank, padded = facts.highest, _padded(facts.highest)
    if rank == padded:
        yield Finding("ok", "rank", f"{rank}, which is not padded (on one GPU)")
    else:
        yield Finding(
            "no",
            "rank",
            f"{rank} is padded to {padded}, and alpha is divided by {padded} from the second kind "
            "of layer on",
            UNIFORM.format(rank=padded),
        )


def patterns(facts: Facts) -> Iterator[Finding]:
    """LoraConfig.load: r and lora_alpha are all that is taken of the settings."""
    for name in ("rank_pattern", "alpha_pattern"):
        if facts.config.get(name):
            says = "ignored: r and lora_alpha count for all layers"
            yield Finding("no", name, says, UNIFORM.format(rank=_padded(facts.highest)))


def _padded(rank: int) -> int:
    # MIN_SGMV_RANK and SGMV_BLOCK_SIZE of utils/sgmv.py, which LoRAX has it from.
    return 8 if rank <= 8 else -(-rank // 16) * 16


RUNTIME = Runtime(
    title="Text Generation Inference 3",
    read_in="server/text_generation_server/adapters/lora.py, utils/adapter.py",
    formats=("peft",),
    rules={
        "peft": (
            lora_only,
            always("needs", "serving", "off unless asked", "LORA_ADAPTERS=NAME=PATH"),
            rank,
            setting("use_dora", "ignored without a word"),
            invocation("ignored without a word: it acts on all tokens"),
            patterns,
            setting("modules_to_save", "ignored without a word"),
            setting("lora_bias", "ignored without a word"),
            bias("ignored without a word"),
            applied("use_rslora"),
            layers,
        )
    },
)
