"""vLLM, run in 0.32.0 (make proof-vllm): PEFT's directory, checked before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.peft.rules import BELOW
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import (
    FACTORS,
    MERGE,
    Finding,
    Runtime,
    always,
    applied,
    bias,
    invocation,
    keys,
    lora_only,
    setting,
)


def rank(facts: Facts) -> Iterator[Finding]:
    """MaxLoRARanks, and the default of max_lora_rank."""
    allowed, usual, rank = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16, facts.highest
    if rank <= usual:
        yield Finding("ok", "rank", f"{rank}, within the usual limit of {usual}")
    elif rank <= allowed[-1]:
        flag = next(limit for limit in allowed if limit >= rank)
        yield Finding("needs", "rank", f"{rank}, above {usual}", f"--max-lora-rank {flag}")
    else:
        yield Finding("no", "rank", f"{rank}, above the highest limit, {allowed[-1]}", MERGE)


def init(facts: Facts) -> Iterator[Finding]:
    """Starts that changed the base are refused by name (_init_is_supported)."""
    init = facts.config.get("init_lora_weights", True)
    plain = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    if isinstance(init, str) and init.lower() not in plain:
        yield Finding(
            "no",
            f"init_lora_weights={init}",
            "refused, as such a start changed the base's weights",
            "write it anew: veneer convert ADAPTER --to peft OUT, if its base is the plain one",
        )


def saved_modules(facts: Facts) -> Iterator[Finding]:
    """Whole modules: classification heads alone, over a model that is served as a classifier
    (_validate_modules_to_save)."""
    saved, heads = set(facts.config.get("modules_to_save") or ()), {"classifier", "score"}
    if others := saved - heads:
        yield Finding("no", "modules_to_save", f"refused: {listed(sorted(others))}", MERGE)
    elif saved:
        says = f"{listed(sorted(saved))}: refused over a base that is not served as a classifier"
        yield Finding("needs", "modules_to_save", says, "--runner pooling --convert classify")


def embeddings(facts: Facts) -> Iterator[Finding]:
    """Embeddings and heads count where a model's class lists them (embedding_modules)."""
    if names := sorted(facts.embeddings | (facts.names & {"lm_head", "embed_out"})):
        yield Finding(
            "needs",
            "embeddings",
            f"{listed(names)}: only over models whose class lists them in embedding_modules",
            "try it; if it is refused, merge",
        )


# How the names of bases begin whose class in vLLM keeps all experts of a block as one weight, as
# PEFT's stacks do (is_3d_moe_weight).
READS_STACKS = ("gpt-oss", "qwen3.5", "qwen3.6", "qwen3-vl", "qwen3-omni", "intern-s1-pro")
SPLIT_STACKS = (
    "--enable-mixed-moe-lora-format --lora-modules "
    """'{"name": "NAME", "path": "PATH", "is_3d_lora_weight": true}'"""
)


def experts(facts: Facts) -> Iterator[Finding]:
    """Other classes take an adapter of each expert, and stacks only if both the server and the
    adapter's entry say so (_validate_moe_lora_format, _convert_3d_to_2d_moe_lora)."""
    if not (stacks := facts.stacks):
        return
    base = str(facts.config.get("base_model_name_or_path") or "").lower().rpartition("/")[2]
    owners = {path.removesuffix(BELOW) for path in stacks}
    if len(stacks) < 2 * len(owners):
        yield Finding("no", "experts", "it reads both stacks of a block's experts or none", MERGE)
    elif base.startswith(READS_STACKS):
        says = "stacks, which it reads over this base, on an accelerator"
        yield Finding("needs", "experts", says, "ask it what only the adapter knows")
    else:
        says = "stacks, refused unless it is told to split them; on an accelerator"
        yield Finding("needs", "experts", says, SPLIT_STACKS)


RUNTIME = Runtime(
    title="vLLM 0.32.0",
    read_in="vllm/lora/peft_helper.py, lora_model.py, model_manager.py; vllm/config/lora.py",
    formats=("peft",),
    run="make proof-vllm",
    rules={
        "peft": (
            lora_only,
            always(
                "needs", "serving", "off unless asked", "--enable-lora --lora-modules NAME=PATH"
            ),
            rank,
            setting("use_dora", "refused"),
            setting("lora_bias", "refused"),
            invocation("refused"),
            setting("layer_replication", "refused"),
            setting("use_bdlora", "refused"),
            setting("use_qalora", "refused"),
            bias("refused"),
            saved_modules,
            experts,
            init,
            applied("use_rslora", "rank_pattern", "alpha_pattern"),
            keys(
                (
                    *FACTORS,
                    r"(embed_tokens|lm_head)\.base_layer\.weight",
                    r"(score|classifier)\.(weight|bias)",
                ),
                "refused",
            ),
            embeddings,
        )
    },
)
