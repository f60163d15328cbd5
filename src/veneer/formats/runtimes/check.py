"""Check an adapter's files against the rules of a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from veneer.errors import AdapterError
from veneer.formats.convert import convert
from veneer.formats.locate import locate
from veneer.formats.names import RuntimeName
from veneer.formats.runtimes import llama_cpp, mlx, ollama, peft, sglang, tgi, vllm
from veneer.formats.runtimes.facts import facts_of
from veneer.formats.runtimes.rules import MERGE, Finding, Runtime

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
    if kind in rules.formats:
        facts = facts_of(adapter, kind)
        return Checked(rules, tuple(f for rule in rules.rules[kind] for f in rule(facts)))
    to = rules.formats[0]
    out = "OUT.gguf --base BASE" if to == "gguf" else "OUT"
    findings = [
        Finding(
            "no",
            "format",
            f"{kind}, and it reads {' and '.join(rules.formats)}",
            f"veneer convert ADAPTER --to {to} {out}",
        )
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
