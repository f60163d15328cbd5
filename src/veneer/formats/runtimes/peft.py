"""PEFT 0.21.2, which our tests run: its own directory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import FACTORS, Finding, Runtime, always

ENDINGS = (*FACTORS, r"lora_[AB]\.bias", "lora_magnitude_vector")


def lora_keys(facts: Facts) -> Iterator[Finding]:
    """set_peft_model_state_dict: what does not match is ignored, and A or B stay at zero."""
    end = re.compile(rf".*\.(?:{'|'.join(ENDINGS)})")
    strange = [
        key
        for key in facts.shapes
        if not key.startswith(("base_model.model.", "prompt_embeddings"))
        or (".lora_" in key and not end.fullmatch(key))
    ]
    if strange:
        yield Finding(
            "no",
            "key names",
            f"ignored, with only a warning: {listed(strange)}",
            "veneer convert ADAPTER --to peft OUT, if it can be read",
        )


def experts(facts: Facts) -> Iterator[Finding]:
    """target_parameters: tuners/lora/layer.py, ParamWrapper."""
    if stacks := facts.stacks:
        yield Finding("ok", "experts", f"{len(stacks)} stacks, by target_parameters")


RUNTIME = Runtime(
    title="PEFT 0.21.2",
    read_in="src/peft/utils/save_and_load.py",
    formats=("peft",),
    run="our tests",
    rules={"peft": (always("ok", "settings", "its own"), experts, lora_keys)},
)
