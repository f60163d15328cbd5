"""The samples of a run: a line of JSON for each, and a page of some of them for people."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from veneer.files import disk_errors, new_file, write_text
from veneer.run_directory import RunDirectory

SHOWN_STEPS = 12  # of which the page shows some samples, spread over the run
SHOWN_GROUPS = 2  # of each of these steps
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem } pre { white-space: pre-wrap; margin: 0; font: inherit }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem }
td, th { border-bottom: 1px solid #8884 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.prompt { font-weight: 600 } .row { color: #888 }
"""


class SampleLog:
    """samples.jsonl and samples.html of a run's directory; nothing without one."""

    def __init__(self, directory: RunDirectory | None) -> None:
        self.directory = directory

    def begin(self, step: int) -> None:
        """Keep the lines up to a step: a run that goes on repeats what came after."""
        if self.directory is None:
            return
        with new_file(self.directory.samples) as file, file.open("w", encoding="utf-8") as kept:
            for line in self._read():
                if line["step"] > step:
                    break
                kept.write(_line(line))

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add the samples of a step."""
        if self.directory is None:
            return
        samples = self.directory.samples
        with disk_errors(samples), samples.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, lines)))

    def end(self) -> None:
        """Write the page."""
        if self.directory is not None and self.directory.samples.exists():
            counts = Counter(line["step"] for line in self._read())
            shown = {*_spread(list(counts), SHOWN_STEPS)}
            lines = [line for line in self._read() if line["step"] in shown]
            write_text(self.directory.samples_page, page_of(lines, counts))

    def _read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines, up to one that was cut off in writing."""
        assert self.directory is not None
        if not self.directory.samples.exists():
            return
        with self.directory.samples.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    yield json.loads(text)
                except ValueError:
                    return


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def page_of(lines: Sequence[Mapping[str, Any]], counts: Mapping[int, int]) -> str:
    """Return a page of some groups of samples, from the run's beginning to its end.

    lines: of the steps that are shown. counts: samples of each step of the run.
    """
    steps = {step: list(own) for step, own in groupby(lines, key=lambda line: line["step"])}
    title = "Samples and their rewards" if any("reward" in line for line in lines) else "Samples"
    sections = "".join(_section(step, own) for step, own in steps.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}'
        f"</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p>{sum(counts.values()):,} samples in {len(counts):,} steps; here are some of "
        f"{len(steps)} steps. "
        f"All are in samples.jsonl.</p>{sections}</html>\n"
    )


def _section(step: int, lines: Sequence[Mapping[str, Any]]) -> str:
    known = [line["reward"] for line in lines if line.get("reward") is not None]
    mean = f", mean reward {sum(known) / len(known):.3f}" if known else ""
    groups = [list(group) for _, group in groupby(lines, key=lambda line: line["row"])]
    return f"<h2>Step {step}{mean}</h2>" + "".join(map(_group, groups[:SHOWN_GROUPS]))


def _group(lines: Sequence[Mapping[str, Any]]) -> str:
    judged = "rewards" in lines[0]
    names = [*lines[0]["rewards"], "reward", "advantage"] if judged else []
    heads = "".join(f'<th class="number">{html.escape(name)}</th>' for name in names)
    rows = "".join(
        f"<tr><td><pre>{html.escape(line['answer'])}{'' if line['ended'] else ' …'}</pre></td>"
        + "".join(
            f'<td class="number">{"–" if value is None else format(value, ".3g")}</td>'
            for value in (_worth(line) if judged else ())
        )
        + "</tr>"
        for line in lines
    )
    return (
        f'<p class="row">{html.escape(lines[0]["row"])}</p><pre class="prompt">'
        f"{html.escape(lines[0]['prompt'])}</pre><table><tr><th>answer</th>{heads}"
        f"</tr>{rows}</table>"
    )


def _worth(line: Mapping[str, Any]) -> tuple[float | None, ...]:
    return (*line["rewards"].values(), line["reward"], line["advantage"])


def _spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
