"""Ollama: llama.cpp's GGUF file, or PEFT's directory, which it converts."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.llama_cpp import gguf_header, gguf_invocation, gguf_pairs
from veneer.formats.runtimes.rules import (
    LLAMA_NAMES,
    MERGE,
    TO_GGUF,
    Finding,
    Runtime,
    always,
    bias,
    invocation,
    lora_only,
    setting,
)


def alpha(facts: Facts) -> Iterator[Finding]:
    """AdapterParameters.Alpha is a uint32, and Go refuses any other number."""
    alpha = facts.config.get("lora_alpha")
    if not isinstance(alpha, int) or isinstance(alpha, bool) or alpha < 0:
        yield Finding("no", "lora_alpha", f"{alpha!r} is no whole number", TO_GGUF)


def qk(facts: Facts) -> Iterator[Finding]:
    """repack: the permutation of q and k is applied to lora_a."""
    if facts.names & {"q_proj", "k_proj"}:
        yield Finding(
            "no",
            "q_proj, k_proj",
            "Ollama's converter permutes their A, where llama.cpp's permutes the rows of their B",
            TO_GGUF,
        )


def layers(facts: Facts) -> Iterator[Finding]:
    """Replacements: the names that become llama.cpp's."""
    if others := sorted(facts.names - LLAMA_NAMES):
        yield Finding("no", "layers", f"not renamed: {listed(others)}", TO_GGUF)


def own_engine(facts: Facts) -> Iterator[Finding]:
    """runner/ollamarunner/runner.go has no LoRA ("loras are not yet implemented"), and runs
    mixtures such as qwen3moe and gpt-oss (Ollama's pull request 12374)."""
    if any("_exps." in key for key in facts.shapes) or facts.stacks:
        says = (
            "Ollama's own engine, which runs mixtures, has no LoRA and says so at the first request"
        )
        yield Finding("no", "experts", says, MERGE)


RUNTIME = Runtime(
    title="Ollama",
    read_in="convert/convert.go, convert_llama_adapter.go; docs/import.mdx",
    formats=("gguf", "peft"),
    rules={
        "gguf": (
            always("needs", "serving", "by a Modelfile", "FROM BASE and ADAPTER FILE.gguf"),
            gguf_header,
            gguf_pairs,
            gguf_invocation,
            own_engine,
        ),
        "peft": (
            lora_only,
            always("needs", "base", "Llama and Gemma 2 alone are converted by Ollama", TO_GGUF),
            alpha,
            qk,
            layers,
            own_engine,
            setting("use_rslora", "ignored: the scale is alpha / r", TO_GGUF),
            setting("alpha_pattern", "ignored", TO_GGUF),
            setting("use_dora", "ignored"),
            invocation("ignored: it acts on all tokens"),
            setting("modules_to_save", "ignored"),
            bias("ignored"),
        ),
    },
)
