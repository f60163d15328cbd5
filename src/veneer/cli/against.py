"""`veneer evaluate --against`: who answers the same prompts better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from veneer.cli.console import OUTPUT, new_table, print_json, show_doing, show_notice
from veneer.cli.flags import AdapterFlags, BaseFlags
from veneer.cli.loading import load_adapted, opening
from veneer.errors import ConfigError, share_text
from veneer.generate.sampling import Sampling
from veneer.rewards.named import rewards_named

if TYPE_CHECKING:
    from veneer.data.problems import Located
    from veneer.data.questions import Question
    from veneer.evaluation.win_rates import WinRate
    from veneer.models.load import Base
    from veneer.rewards.judged import Answered

BASE = "base"


@dataclass(frozen=True)
class AgainstFlags:
    """What is compared with what, and by whom."""

    against: str | None = None
    """Instead of tasks: base, or an adapter, whose answers to --prompts are compared with those of
    --adapter."""
    prompts: Path | None = None
    """With --against: a file of prompts, as for veneer generate."""
    judge: list[str] | None = None
    """With --against: what an answer is worth, as tune's --reward: exact, regex:PATTERN,
    json:SCHEMA.json, tests, FILE.py:FUNCTION, or model:ADAPTER, a reward model. Several are added
    up."""
    judge_seconds: float = 10.0
    """Seconds that judging one answer may take."""
    batch_size: int = 32
    """With --against: how many prompts are answered at a time."""


def named_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Return adapters by name, of which each is DIRECTORY or NAME=DIRECTORY.

    Raises ConfigError, which lists everything that is wrong.
    """
    adapters: dict[str, Path] = {}
    problems = []
    for text in texts:
        name, equals, directory = text.partition("=")
        if not equals:
            name = directory = text
        if not (name and directory):
            problems.append(f"{text!r} must be DIRECTORY or NAME=DIRECTORY")
        elif name in adapters or name == BASE:
            problems.append(f"the name {name!r} is taken")
        adapters[name] = Path(directory).expanduser()
    if problems:
        raise ConfigError(f"--adapter cannot be followed: {'; '.join(problems)}.")
    return adapters


def compare_answers(
    model: str | None,
    adapters: Mapping[str, Path],
    flags: AgainstFlags,
    system: str | None,
    sampling: Sampling,
    loading: BaseFlags,
    *,
    as_json: bool,
) -> None:
    """Print how often the answers of one adapter are better than those of another side."""
    from veneer.data.questions import read_prompts
    from veneer.evaluation.win_rates import win_rate
    from veneer.training.reward_model import ModelReward

    assert flags.against is not None
    assert flags.prompts is not None
    specs = flags.judge or []
    (name,) = adapters
    other = BASE if flags.against == BASE else flags.against
    sides = dict(adapters)
    if other != BASE:
        ((other, path),) = named_adapters([flags.against]).items()
        if other in sides:
            raise ConfigError(f"--against names {other!r}, which is the --adapter itself.")
        sides[other] = path
    prompts = read_prompts(flags.prompts)
    limits = [flags.judge_seconds] * len(specs)
    model_judge = partial(ModelReward, device=loading.device)
    with rewards_named(specs, [1.0] * len(specs), limits, model=model_judge) as judges:
        as_adapter = AdapterFlags(loading.device, loading.dtype, loading.bits)
        base = load_adapted(model, sides, as_adapter)
        ours = _answers(base, name, name, prompts, flags, system, sampling)
        theirs = _answers(base, other, name, prompts, flags, system, sampling)
        rate = win_rate(ours, theirs, judges)
    if rate.unjudged:
        show_notice(f"{rate.unjudged:,} prompts are not judged: {rate.first_fault}")
    if as_json:
        print_json(_rate_as_json(rate, name, other, specs))
        return
    _print_rate(rate, name, other)


def _answers(
    base: Base,
    name: str,
    opened_as: str,
    prompts: Sequence[Located[Question]],
    flags: AgainstFlags,
    system: str | None,
    sampling: Sampling,
) -> list[Answered]:
    """Return a side's answers. opened_as: the adapter whose system prompt the base takes too, so
    that only the adapter makes them differ."""
    import veneer
    from veneer.data.questions import behind
    from veneer.generate.many import check_all
    from veneer.rewards.judged import Answered

    asked = behind(opening(base, opened_as if name == BASE else name, system), prompts)
    veneer.use(base.model, None if name == BASE else name)
    check_all(base.model, base.tokenizer, asked)
    show_doing(f"Answering {len(asked):,} prompts with {name}")
    texts = veneer.answers(
        base.model,
        base.tokenizer,
        [prompt.value.turns for prompt in asked],
        sampling=sampling,
        batch=flags.batch_size,
    )
    return [
        Answered(
            text,
            [{"role": turn.role, "content": turn.content} for turn in prompt.value.turns],
            prompt.value.references,
            prompt.value.item,
            str(prompt.place),
        )
        for prompt, text in zip(asked, texts, strict=True)
    ]


def _rate_as_json(rate: WinRate, name: str, other: str, judges: Sequence[str]) -> dict[str, Any]:
    from veneer.evaluation.win_rates import wilson

    return {
        "adapter": name,
        "against": other,
        "judges": list(judges),
        **asdict(rate),
        "win_interval": wilson(rate.wins, rate.judged),
        "loss_interval": wilson(rate.losses, rate.judged),
        "win_of_decided": rate.wins / rate.decided if rate.decided else None,
        "win_of_decided_interval": wilson(rate.wins, rate.decided),
        "verdict": rate.verdict,
    }


def _print_rate(rate: WinRate, name: str, other: str) -> None:
    from veneer.evaluation.win_rates import wilson

    table = new_table(f"{name} against {other}", "Prompts", "Share", "95 % (Wilson)")
    rows = (
        ("wins", rate.wins, rate.judged),
        ("ties", rate.ties, rate.judged),
        ("losses", rate.losses, rate.judged),
        ("wins, where one is better", rate.wins, rate.decided),
    )
    for label, count, of in rows:
        low, high = wilson(count, of)
        share = share_text(count / of) if of else "-"
        table.add_row(label, f"{count:,}", share, f"{low:.1%} to {high:.1%}")
    OUTPUT.print(table)
    says = {
        "better": f"{name} answers better than {other}.",
        "worse": f"{name} answers worse than {other}.",
        "undecided": "Which answers better is not decided by these prompts.",
    }
    OUTPUT.print(escape(says[rate.verdict]))
