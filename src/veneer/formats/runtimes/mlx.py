"""mlx-lm, read in 0.32.2: its own directory."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.mlx import ENDINGS, TYPES
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import MERGE, Finding, Runtime, always


def settings(facts: Facts) -> Iterator[Finding]:
    """linear_to_lora_layers: what it asks of lora_parameters."""
    parameters = facts.config.get("lora_parameters") or {}
    missing = [name for name in ("rank", "scale", "dropout") if name not in parameters]
    missing += ["num_layers"] if "num_layers" not in facts.config else []
    if missing:
        yield Finding("no", "settings", f"missing: {listed(missing)}", "write them into its file")
    kind = facts.config.get("fine_tune_type", "lora")
    if kind not in (*TYPES, "full"):
        yield Finding("no", "fine_tune_type", f"{kind!r} is unknown", "lora, dora or full")
    if "alpha" in parameters:
        yield Finding(
            "no",
            "alpha",
            "ignored; early versions multiplied scale by alpha / rank",
            "let scale be the factor meant, and take alpha out",
        )


def shapes(facts: Facts) -> Iterator[Finding]:
    """load_adapters: names that are adapters' own, and one rank for all layers."""
    if strange := [key for key in facts.shapes if key.rpartition(".")[2] not in ENDINGS]:
        yield Finding("no", "key names", f"no parameters of an adapter: {listed(strange)}", MERGE)
    rank = (facts.config.get("lora_parameters") or {}).get("rank")
    other = [
        key
        for key, shape in facts.shapes.items()
        for end in [key.rpartition(".")[2]]
        if len(shape) == 2 and rank != {"lora_a": shape[1], "lora_b": shape[0]}.get(end, rank)
    ]
    if other:
        yield Finding("no", "rank", f"not {rank}, as the settings say: {listed(other)}", MERGE)
    else:
        yield Finding("ok", "rank", f"{rank}, the same in all layers")


def experts(facts: Facts) -> Iterator[Finding]:
    """LoRASwitchLinear, of which each projection of the experts is one."""
    if stacks := [key for key, shape in facts.shapes.items() if len(shape) == 3]:
        yield Finding("ok", "experts", f"{len(stacks) // 2} projections, on routed rows alone")


RUNTIME = Runtime(
    title="mlx-lm 0.32.2",
    read_in="mlx_lm/tuner/utils.py, lora.py, dora.py",
    formats=("mlx",),
    run="our tests",
    rules={
        "mlx": (
            always("needs", "serving", "by a flag", "--adapter-path DIRECTORY"),
            settings,
            shapes,
            experts,
        )
    },
)
