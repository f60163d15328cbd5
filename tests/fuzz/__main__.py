"""Fuzz parsers of foreign bytes: python -m fuzz [TARGET ...] [--seconds 60] [--out DIRECTORY]

The fuzzer is libFuzzer, by atheris. Each target has a process, forked when all is imported. New
inputs that reach more of the code stay below OUT/corpus and are where the next call goes on; what
ends wrongly is below OUT/findings, once for each place in the code. Prints a line for each target
and exits with 1 where there are findings, or a target's process died.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

os.environ["HF_HUB_OFFLINE"] = "1"
INSTRUMENTED = (
    *("veneer.files", "veneer.checksums", "veneer.formats", "veneer.models.gguf", "veneer.data"),
    *("veneer.models.gguf_header", "veneer.models.load", "veneer.adapter.config"),
    *("veneer.cli.recipes", "veneer.cli.jobs_file", "veneer.cli.file_settings", "veneer.rewards"),
    *("veneer.serve.api", "yaml", "jinja2", "gguf", "python_multipart"),
)
LONGEST = 4096  # bytes of an input that is no longer to begin with
HANGS = 60  # seconds, after which libFuzzer ends a process that nothing else has ended
ADDRESSES = 2**31  # bytes of address space beyond what the process has at the start

with atheris.instrument_imports(include=list(INSTRUMENTED)):
    from fuzz.findings import Findings, listed
    from fuzz.target import NAMES, Target, corpus, judge, target
    from support.endings import stop
    from veneer.cli.console import quieten_libraries

    TARGETS = {name: target(name) for name in NAMES}


def fuzz(chosen: Target, seconds: float, inputs: Path, findings: Path, home: Path) -> None:
    """Try new inputs for so long, and end the process."""
    seen = Findings(findings)
    signal.signal(signal.SIGPROF, stop)

    def once(data: bytes) -> None:
        end, wrong = judge(chosen, data, home)
        if wrong is not None:
            seen.add(data, end, wrong)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        if chosen.mutate is None or seed % 2:
            return atheris.Mutate(data, most)
        try:
            return chosen.mutate(data, Random(seed))[:most]
        except Exception:  # it is no longer what only who knows the format can change
            return atheris.Mutate(data, most)

    seeds = chosen.seeds()
    for number, seed in enumerate(seeds):
        (inputs / f"seed-{number}").write_bytes(seed)
        once(seed)  # what is imported and kept from here on is no input's
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    longest = max(LONGEST, *(len(seed) for seed in seeds))
    flags = [f"-max_total_time={seconds:g}", f"-timeout={HANGS}", f"-max_len={longest}"]
    flags += [f"-report_slow_units={HANGS}"]  # by the clock, which on a busy machine says little
    flags += ["-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={findings}/"]
    atheris.Setup([sys.argv[0], *flags, str(inputs)], once, custom_mutator=changed)
    atheris.Fuzz()


def in_a_process(name: str, seconds: float, out: Path) -> tuple[str, bool]:
    """Fuzz a target in a fork, and return the table's line of what was done, and whether the
    process ended well and found nothing."""
    inputs, findings, log = out / "corpus" / name, out / "findings" / name, out / f"{name}.log"
    inputs.mkdir(parents=True, exist_ok=True)
    for kept in corpus(name):
        (inputs / kept.name).write_bytes(kept.read_bytes())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        if (child := os.fork()) == 0:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            fuzz(TARGETS[name], seconds, inputs, findings, Path(home))
            os._exit(0)
        _, status = os.waitpid(child, 0)
    text = log.read_text(errors="replace")
    executions = re.findall(r"stat::number_of_executed_units: (\d+)|^#(\d+)", text, re.MULTILINE)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text) or [("0", "0", "0")]
    done = max((int(a or b) for a, b in executions), default=0)
    edges, features, kept_now = map(int, covered[-1])
    code = os.waitstatus_to_exitcode(status)
    ended = "" if code == 0 else f"  ended with {code}, see {log}"
    number = len(listed(findings))
    line = f"{name:12}{done:>12,}{edges:>9,}{features:>10,}{kept_now:>8,}{number:>10}{ended}"
    return line, code == number == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("dist/fuzz"))
    options = parser.parse_args()
    if strange := sorted({*options.targets} - {*NAMES}):
        parser.error(f"no targets: {', '.join(strange)}; there are {', '.join(NAMES)}")
    quieten_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    heads = ("executions", "edges", "features", "corpus", "findings")
    widths = (12, 9, 10, 8, 10)
    print("target".ljust(12) + "".join(map(str.rjust, heads, widths)), flush=True)
    is_well = True
    for name in options.targets:
        line, ended_well = in_a_process(name, options.seconds, options.out.resolve())
        print(line, flush=True)
        is_well &= ended_well
    lines = [line for name in options.targets for line in listed(options.out / "findings" / name)]
    print(*lines, sep="\n")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
