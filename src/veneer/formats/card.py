"""A model card for an adapter: text for people below a header for hubs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from veneer.adapter.config import LoRA
from veneer.adapter.method import description
from veneer.formats.contents import acts_from
from veneer.formats.state import AdapterState
from veneer.formats.training import base_in, system_prompt, unfinished

# What hubs call a model's use, by PEFT's name for its task.
USES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}


def card(state: AdapterState) -> str:
    """Return an adapter's README.md: base, tags, and of its training the data's hash, the recipe,
    what was measured and the licence of the base, as far as they are known."""
    config = state.config
    kind = "lora" if isinstance(config, LoRA) else config.method
    head: dict[str, Any] = {"library_name": "peft", "tags": ["veneer", kind]}
    if base_name := state.hub_name:
        head["base_model"] = base_name
        head["tags"].append(f"base_model:adapter:{base_name}")
    if state.task in USES:
        head["pipeline_tag"] = USES[state.task]
    base = base_name or "an unnamed base"
    if isinstance(config, LoRA):
        name = "Activated LoRA" if config.invocation else "DoRA" if config.dora else "LoRA"
        layers = sum(1 for _ in state.layers())
        summary = f"{name} of rank {config.rank} and alpha {config.alpha:g} over {layers} layers of"
    else:
        summary = f"{description(config).capitalize()} for"
    lines = ["---", yaml.safe_dump(head, sort_keys=True).rstrip(), "---", ""]
    lines += [f"# An adapter for {base}", "", f"{summary} {base}, trained with Veneer.", ""]
    if where := acts_from(state):
        lines += [f"It acts {where} in each row, and on no token before.", ""]
    lines += [
        "    from peft import PeftModel",
        "    PeftModel.from_pretrained(base, directory)",
        "",
    ]
    if licence := state.training.get("licence"):
        lines += ["## Licence of the base", "", f"{base} is under {licence}.", ""]
    if isinstance(figures := state.training.get("figures"), Mapping):
        lines += ["## Measured", "", "| what | value |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in figures.items()]
        lines += [""]
    if base_then := base_in(state.training):
        lines += ["## Trained over", "", f"{base}, computed in {base_then}.", ""]
    if system := system_prompt(state.training):
        quoted = "\n".join(f"    {line}" for line in system.splitlines())
        lines += ["## System prompt", "", "All conversations began with it:", "", quoted, ""]
    if data := state.training.get("data"):
        lines += ["## Data", "", f"Hash of its tokens and labels: `{data}`.", ""]
    if recipe := state.training.get("recipe"):
        text = yaml.safe_dump(without_places(recipe), sort_keys=False).rstrip()
        lines += ["## Recipe", "", "```yaml", text, "```", ""]
        if step := unfinished(state.training):
            lines += [f"These are the weights of {step}; the recipe is of the whole run.", ""]
    return "\n".join(lines)


def without_places(recipe: Any) -> Any:
    """Return a recipe in which files of this machine have their names alone: where they lie is
    nobody else's affair."""
    if isinstance(recipe, Mapping):
        return {key: without_places(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [without_places(value) for value in recipe]
    if isinstance(recipe, str) and recipe.startswith(("/", "~", "../")):
        return Path(recipe).name
    return recipe
