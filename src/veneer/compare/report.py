"""comparison.md and comparison.json: what was found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.compare.quality import TITLES, Measure
from veneer.compare.summary import Comparison, Row
from veneer.files import write_json, write_text

KINDS: dict[Measure, str] = {"exact": "exact match", "bleu": "BLEU"}
TABLE, NUMBERS = "comparison.md", "comparison.json"


def write_report(comparison: Comparison, out: Path) -> None:
    """Write comparison.md and comparison.json below `out`."""
    write_text(out / TABLE, markdown(comparison))
    write_json(out / NUMBERS, comparison.as_json())


def markdown(comparison: Comparison) -> str:
    """Return the tables and a sentence about each row."""
    blocks = [
        "# Methods side by side",
        settings_line(comparison),
        _table(comparison, "Method", comparison.rows),
        _explained(comparison, comparison.rows),
    ]
    if comparison.swept:
        blocks += [
            "## Ranks and targets of LoRA",
            _table(comparison, "LoRA", comparison.swept),
            _explained(comparison, comparison.swept),
        ]
    return "\n\n".join(block for block in [*blocks, _columns(comparison)] if block) + "\n"


def settings_line(comparison: Comparison) -> str:
    """Return one line: what was compared, over which rows, and with how much for each."""
    config, base = comparison.config, comparison.base
    budget = config.allowed_of(base.steps)
    clauses = [
        f"{comparison.model} in {base.dtype}",
        f"{base.rows:,} rows of {comparison.data.name} to train on and {base.held_out:,} held out",
        f"{budget} for each, of {base.tokens_a_step:,.0f} tokens a step",
    ]
    counts = {run.tokens for by_seed in comparison.results.values() for run in by_seed.values()}
    if len(counts) == 1:
        clauses[-1] += f" ({counts.pop():,} in all)"
    last = config.seed + config.seeds - 1
    clauses.append(f"seed {config.seed}" if config.seeds == 1 else f"seeds {config.seed} to {last}")
    if comparison.measure and config.test:
        asked = f"{len(base.answers):,} questions of {config.test.name}"
        how = f" (sacrebleu {base.signature})" if base.signature else ""
        clauses.append(f"{KINDS[comparison.measure]} over {asked}{how}")
    return "; ".join(clauses) + "."


def cells(comparison: Comparison, row: Row) -> dict[str, str]:
    """Return a row of the table as text, by the titles of its columns."""
    trained = "" if row.trained is None else f"{row.trained:,}"
    quality = {}
    if comparison.measure:
        shown = "" if row.quality is None else row.quality.text(1)
        quality = {TITLES[comparison.measure]: shown}
    speed, shared = row.tokens_per_second, "shared" if row.together else ""
    return {
        "Trained parameters": "failed" if row.errors and not row.seeds else trained,
        "%": "" if row.share is None else f"{row.share:.3%}".removesuffix("%"),
        "Peak memory (GB)": shared if row.peak is None else f"{row.peak / 1e9:.2f}",
        "tokens/s": shared if speed is None else f"{speed:,.0f}",
        "Minutes": shared if row.minutes is None else f"{row.minutes:.2f}",
        "Evaluation loss": "" if row.eval_loss is None else row.eval_loss.text(4),
        **quality,
        "General loss, change": "" if row.forgotten is None else row.forgotten.text(4, signed=True),
        "On disk per task (MB)": "" if row.kept is None else _megabytes(row.kept),
        "Base unchanged": _yes(row.base_unchanged),
        "Swappable": _yes(row.swappable),
    }


def _table(comparison: Comparison, first: str, rows: Sequence[Row]) -> str:
    shown = [cells(comparison, row) for row in rows]
    names = [row.label.name.replace("|", "\\|") for row in rows]
    lines = [[first, *shown[0]], ["---", *["---:"] * len(shown[0])]]
    lines += [[name, *each.values()] for name, each in zip(names, shown, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _explained(comparison: Comparison, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        line = f"- **{row.label.name}**: {row.label.explained}"
        if row.lr is not None:
            line += f" Learning rate {row.lr:g}, {row.steps:,} steps"
            if tried := comparison.trials.get(row.label.run):
                losses = ", ".join(f"{lr:g}: {_loss(loss)}" for lr, loss in tried.items())
                line += f" (evaluation loss after a tenth of them at {losses})"
            line += "."
        lines += [line, *(f"  Failed: {_one_line(error)}" for error in row.errors)]
        runs = comparison.results.get(row.label.run, {}).values()
        if skipped := sum(run.skipped for run in runs):
            lines.append(f"  {skipped} steps had no finite loss or gradient, and changed nothing.")
        noticed = dict.fromkeys(notice for run in runs for notice in run.notices)
        lines += [f"  Note: {_one_line(notice)}" for notice in noticed]
    return "\n".join(lines)


def _columns(comparison: Comparison) -> str:
    whose = "the whole process's, libraries and base included, mapped files too"
    if (device := comparison.base.device) != "cpu":
        whose = f"what tensors took on {device}"
    text = (
        f"Peak memory while training is {whose}; tokens/s are medians of steps, and minutes those "
        "of training alone. The change of the general loss is that of the mean loss a token on "
        "text that training does not show: what was forgotten. Whether the base is unchanged was "
        "measured by a hash of all its weights before and after."
    )
    if comparison.config.allowed_of(comparison.base.steps).unit == "minutes":
        text += (
            " Each method's steps were chosen by its speed, measured first, to fill its minutes."
        )
    if comparison.config.together:
        text += (
            " Shared: these runs trained together, in passes over one base, so that neither time "
            "nor memory is of one of them."
        )
    if comparison.config.seeds > 1:
        text += " ± is the standard deviation over seeds."
    return text


def _megabytes(count: int) -> str:
    """Return bytes in MB, to three digits or the whole number."""
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _yes(value: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[value]


def _one_line(text: str) -> str:
    return " ".join(text.split())
