"""llama.cpp: one GGUF file of type adapter."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import listed
from veneer.formats.runtimes.facts import Facts
from veneer.formats.runtimes.rules import MERGE, TO_GGUF, Finding, Runtime, always


def gguf_header(facts: Facts) -> Iterator[Finding]:
    """llama_adapter_lora_init_impl: what the metadata must say."""
    for key, needed in (("general.type", "adapter"), ("adapter.type", "lora")):
        if facts.config.get(key) != needed:
            yield Finding(
                "no", key, f"is {facts.config.get(key)!r}, but must be {needed!r}", TO_GGUF
            )
    architecture = facts.config.get("general.architecture")
    yield Finding("needs", "architecture", f"{architecture}, as the base's must be", "-m BASE.gguf")
    alpha = facts.config.get("adapter.lora.alpha")  # get_scale in llama-adapter.h
    says = f"alpha / rank, with alpha {alpha}" if alpha else "one, since it says no alpha"
    yield Finding("ok", "scale", says)


def gguf_pairs(facts: Facts) -> Iterator[Finding]:
    """Each tensor is one of a pair, or a norm, which is ignored."""
    halves = {key for key in facts.shapes if key.endswith((".lora_a", ".lora_b"))}
    ends = {"a": "b", "b": "a"}
    alone = [key for key in halves if key[:-1] + ends[key[-1]] not in halves]
    strange = [k for k in facts.shapes if k not in halves and not k.endswith("_norm.weight")]
    if wrong := sorted(alone + strange):
        yield Finding("no", "tensors", f"neither a pair nor a norm: {listed(wrong)}", TO_GGUF)
    if norms := [key for key in facts.shapes if key.endswith("_norm.weight")]:
        yield Finding("no", "norms", f"ignored without a word: {listed(norms)}", MERGE)


def gguf_invocation(facts: Facts) -> Iterator[Finding]:
    """llama-server looks for the invocation in each prompt, from its end (server-context.cpp), and
    so does what is built upon it: llama-cli, and Ollama since llm/llama_server.go starts it."""
    if facts.config.get("adapter.alora.invocation_tokens"):
        says = "followed by llama-server and what is built upon it; else it acts on all tokens"
        yield Finding("needs", "invocation", says, "serve it by llama-server")


def gguf_experts(facts: Facts) -> Iterator[Finding]:
    """build_lora_mm_id multiplies with stacks of experts, on the rows that are routed to each."""
    if stacks := [key for key in facts.shapes if "_exps." in key]:
        flat = [key for key in stacks if len(facts.shapes[key]) != 3]
        if flat:
            yield Finding("no", "experts", f"no stacks of matrices: {listed(flat)}", TO_GGUF)
        else:
            yield Finding("ok", "experts", f"{len(stacks) // 2} stacks, on routed rows alone")


RUNTIME = Runtime(
    title="llama.cpp",
    read_in="src/llama-adapter.cpp, llama-adapter.h",
    formats=("gguf",),
    run="our tests",
    rules={
        "gguf": (
            always("needs", "serving", "by a flag", "--lora FILE.gguf"),
            gguf_header,
            gguf_pairs,
            gguf_invocation,
            gguf_experts,
        )
    },
)
