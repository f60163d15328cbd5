"""Check an adapter's files against the rules of a runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from veneer.errors import AdapterError, shortened
from veneer.formats.convert import convert
from veneer.formats.locate import locate
from veneer.formats.names import RuntimeName
from veneer.formats.runtimes import llama_cpp, mlx, ollama, peft, sglang, tgi, vllm
from veneer.formats.runtimes.facts import facts_of
from veneer.formats.runtimes.rules import MERGE, Finding, Runtime
from veneer.formats.training import base_in, system_prompt

RUNTIMES: dict[RuntimeName, Runtime] = {
    "vllm": vllm.RUNTIME,
    "sglang": sglang.RUNTIME,
    "tgi": tgi.RUNTIME,
    "ollama": ollama.RUNTIME,
    "llama.cpp": llama_cpp.RUNTIME,
    "peft": peft.RUNTIME,
    "mlx": mlx.RUNTIME,
}


@dataclass(frozen=True)
class Checked:
    """The findings of a check."""

    runtime: Runtime
    findings: tuple[Finding, ...]

    @property
    def loads(self) -> bool:
        """Whether it will load, as it is or with the flags that are named."""
        return all(finding.verdict != "no" for finding in self.findings)


def check(adapter: Path, runtime: RuntimeName) -> Checked:
    """Read an adapter's files as `runtime` would.

    An adapter of another format is converted in a temporary directory first, so that the findings
    cover what the converted one would lack. Raises AdapterError for none, or a damaged one.
    """
    rules = RUNTIMES[runtime]
    located = locate(adapter)
    adapter, kind = located.path, located.format
    known = tuple(_of_training(located.training))
    if kind in rules.formats:
        facts = facts_of(adapter, kind)
        return Checked(rules, tuple(f for rule in rules.rules[kind] for f in rule(facts)) + known)
    to = rules.formats[0]
    out = "OUT.gguf --base BASE" if to == "gguf" else "OUT"
    findings = [
        *known,
        Finding(
            "no",
            "format",
            f"{kind}, and it reads {' and '.join(rules.formats)}",
            f"veneer convert ADAPTER --to {to} {out}",
        ),
    ]
    if to == "gguf":  # which layers are called what there depends on the base
        return Checked(rules, tuple(findings))
    with TemporaryDirectory() as directory:
        converted = Path(directory) / "converted"
        try:
            convert(adapter, converted, to=to)
        except AdapterError as error:
            findings.append(Finding("no", "conversion", str(error), MERGE))
        else:
            facts = facts_of(converted, to)
            findings += [f for rule in rules.rules[to] for f in rule(facts)]
    return Checked(rules, tuple(findings))


def _of_training(training: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what no runtime knows, and the answers depend on."""
    if (base := base_in(training)) and base.bits:
        says = f"trained over its base in {base}: over other bits its answers may differ"
        yield Finding("needs", "base", says, f"load the base there in {base.bits} bits too")
    if system := system_prompt(training):
        says = f"trained with {shortened(system)!r}, which no runtime adds"
        yield Finding("needs", "system prompt", says, "send it with each request")
