"""SGLang, read in 0.5.23: PEFT's directory, but only r, lora_alpha and the layers' names."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import (
    FACTORS,
    LLAMA_NAMES,
    MERGE,
    UNIFORM,
    Finding,
    Runtime,
    always,
    bias,
    invocation,
    keys,
    lora_only,
    setting,
)


def targets(facts: Facts) -> Iterator[Finding]:
    """target_modules must be a list of names, and no pattern (init_lora_shapes)."""
    targets = facts.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding(
            "no",
            "target_modules",
            f"{targets!r} is a pattern, and a list of names is needed",
            "veneer convert ADAPTER --to peft OUT",
        )


def stacks(facts: Facts) -> Iterator[Finding]:
    """q, k, v are stacked, and gate and up, each set as one (normalize_qkv_proj and others)."""
    needed = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    paths, lonely = facts.ranks, []
    for path in sorted(paths):
        block, _, name = path.rpartition(".")
        beside = needed.get(name)
        if beside and f"{block}.{beside}" not in paths:
            lonely.append(f"{path} without {beside}")
    if lonely:
        yield Finding("no", "stacked layers", f"not loaded: {listed(lonely)}", MERGE)


def rank(facts: Facts) -> Iterator[Finding]:
    """max_lora_rank is that of the adapters in --lora-paths unless given."""
    yield Finding(
        "needs",
        "rank",
        f"{facts.highest}; the limit is that of the adapters in --lora-paths, unless given",
        f"--max-lora-rank {facts.highest}, where the adapter is loaded later",
    )


def names(facts: Facts) -> Iterator[Finding]:
    """SUPPORTED_LORA_TARGET_MODULES, as far as transformers' models have them."""
    more = {"qkv_proj", "gate_up_proj", "embed_tokens", "lm_head", "q_a_proj", "q_b_proj"}
    more |= {"kv_a_proj_with_mqa", "kv_b_proj"}
    layers = {path.rpartition(".")[2] for path in facts.ranks}
    if others := sorted(layers - LLAMA_NAMES - more):
        yield Finding(
            "needs",
            "layers",
            f"{listed(others)}: only over models whose class in SGLang serves them",
            "try it; if it is refused, merge",
        )


def experts(facts: Facts) -> Iterator[Finding]:
    """It reads an adapter of each expert, and drops the stacks that PEFT writes (its pull requests
    25528 and 27381, which were closed); --lora-strict-loading refuses them."""
    if facts.stacks:
        says = "stacks, which are dropped without a word"
        yield Finding("no", "experts", says, MERGE)


def by_weight(facts: Facts) -> Iterator[Finding]:
    """get_target_module_name knows target_modules alone. Layers beside experts may be named by
    their weights in target_parameters, since PEFT would take their own names for experts."""
    targets = facts.config.get("target_modules") or []
    if not facts.config.get("target_parameters") or not isinstance(targets, list):
        return
    named = {str(target).rpartition(".")[2] for target in targets}
    if lacking := [path for path in facts.ranks if path.rpartition(".")[2] not in named]:
        says = f"an error, since target_modules does not name {listed(lacking)}"
        yield Finding("no", "target_parameters", says, MERGE)


def tokens(facts: Facts) -> Iterator[Finding]:
    """added_tokens.json gives an adapter new tokens (get_added_tokens_config)."""
    if "added_tokens.json" in facts.files:
        yield Finding("no", "added_tokens.json", "adapters with new tokens are refused", MERGE)


RUNTIME = Runtime(
    title="SGLang 0.5.23",
    read_in="sglang/srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py",
    formats=("peft",),
    rules={
        "peft": (
            lora_only,
            always("needs", "serving", "off unless asked", "--lora-paths NAME=PATH"),
            rank,
            setting("use_dora", "refused"),
            invocation("ignored: it acts on all tokens"),
            setting("use_rslora", "ignored: the scale is alpha / r", UNIFORM),
            setting("alpha_pattern", "ignored: one alpha counts for all", UNIFORM),
            setting("rank_pattern", "ignored: other shapes than r's stop it", UNIFORM),
            setting("modules_to_save", "ignored"),
            setting("lora_bias", "ignored"),
            bias("ignored"),
            targets,
            stacks,
            experts,
            by_weight,
            names,
            tokens,
            keys((*FACTORS, r"base_layer\.weight"), "ignored"),
        )
    },
)
