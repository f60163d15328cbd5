"""A run up to its base: its rows, its choices, and whether it is the run that is to go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PretrainedConfig

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.adapter.new_tokens import extend_tokenizer
from veneer.data.columns import lengths_of
from veneer.errors import ConfigError, TrainingError, joined
from veneer.objectives.config import ANSWERS
from veneer.objectives.policy_config import OnPolicy
from veneer.processes.world import ALONE, World
from veneer.training import start_from
from veneer.training.choose import choose, explain, hidden_size_of
from veneer.training.config import NOT_OF_THE_COURSE, YOUNGER
from veneer.training.events import Event, Notice
from veneer.training.preflight import Preflight
from veneer.training.recipe import Recipe
from veneer.training.rows import RunRows, in_every_process, load_rows
from veneer.training.state import other_settings
from veneer.training.teacher import DIGEST

# As YOUNGER, of all of a recipe.
YOUNGER_SETTINGS = {
    **YOUNGER,
    **asdict(ANSWERS),
    **OnPolicy().settings(),
    "pack_head": False,
    "method": "lora",
    "train_head": False,
    "train_norms": False,
    "dora": False,
    "lora_fa": False,
    "invocation": None,
    "expert_rank": None,
    "shared_expert_a": False,
    "long_rows": None,
    "deduplicate": False,
    "from": None,
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run before its base is loaded: `recipe` without any choice left, and a hash of its rows."""

    recipe: Recipe
    ahead: Preflight
    rows: RunRows
    data: str

    def identity(self, base: Mapping[str, str]) -> dict[str, Any]:
        """Return all that decides the course of a run: a checkpoint goes on only with the same.

        base: the base's fingerprint
        """
        return {**settings_of(self.recipe), "data": self.data, "base": base}


def prepare(
    ahead: Preflight, *, world: World = ALONE, rows: RunRows | None = None
) -> Generator[Event, None, Prepared]:
    """Read the rows, unless given, choose what the recipe leaves open, and yield what happens.

    Raises TrainingError where the run that is to go on is another one, DataError for rows that
    cannot be used.
    """
    recipe, before, start, tokenizer = ahead.recipe, ahead.before, ahead.start, ahead.tokenizer
    if before:
        _check_goes_on(recipe, before)
    if start is not None:
        yield Notice(f"Starts from {recipe.start_from}: {start_from.in_words(recipe.what_trains)}.")
        if start.new_tokens:
            tokenizer = copy.deepcopy(tokenizer)
            extend_tokenizer(tokenizer, start.new_tokens.tokens)
    if rows is None:
        rows = yield from in_every_process(world, load_rows(recipe, ahead.config, tokenizer))
    data = rows.identity(before.get("data"))
    if "data" in before:
        _check_goes_on(recipe, before, data=data)
    if start and start.new_tokens and rows.new_tokens:
        raise ConfigError(f"{recipe.start_from} has new tokens, and --new-words can add no others.")
    yield rows.ready
    yield from map(Notice, rows.notices)
    recipe, choices = _choose(recipe, rows, ahead.config)
    if choices:
        yield Notice(choices)
    return Prepared(recipe, ahead, rows, data)


def _choose(recipe: Recipe, rows: RunRows, config: PretrainedConfig) -> tuple[Recipe, str | None]:
    """Return the recipe without any choice left, and what was chosen in words.

    Raises ConfigError for settings of evaluation where no rows are held out.
    """
    hidden_size = hidden_size_of(config)
    lengths = lengths_of(rows.examples)
    given = recipe.training
    chosen = choose(
        given,
        lengths,
        what_trains=recipe.what_trains,
        hidden_size=hidden_size,
        share_of_rate=recipe.objective.share_of_rate,
    )
    held_out = 0 if rows.ready.eval_data else len(rows.held_out)
    asks = recipe.rows.eval_rows is not None or rows.ready.eval_data
    choices = explain(
        given, chosen, lengths, hidden_size=hidden_size, held_out=None if asks else held_out
    )
    return replace(recipe, training=chosen, rows=replace(recipe.rows, eval_rows=held_out)), choices


def _check_goes_on(recipe: Recipe, before: Mapping[str, Any], **more: str) -> None:
    """Raise TrainingError where the recipe is no longer that of the run which is to go on.

    more: what is known beside the recipe, of data, base, computed_in; the loop checks the others
    """
    beside = {"data", "base", "computed_in", DIGEST} - {*more}
    before, now = (
        {name: value for name, value in settings.items() if name not in beside}
        for settings in (before, {**settings_of(recipe), **more})
    )
    if not (differing := other_settings(before, now)):
        return
    ways = [
        "name that run's rows" if more else "leave that out",
        "start anew by --force or another --out",
    ]
    names = {text.partition(" ")[0] for text in differing}
    of_adapter = {field.name for kind in (LoRA, Method) for field in fields(kind)}
    if recipe.adapter.exists() and not names & {*of_adapter, "model", "bits"}:
        ways.append(f"start from what it learnt, elsewhere: --from {recipe.adapter} --out OTHER")
    either = "; or ".join(ways)
    raise TrainingError(
        f"The run in {recipe.out} cannot go on so: {joined(differing)}. Either {either}."
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide a run's course, as a checkpoint has them."""
    settings = {k: v for k, v in recipe.settings().items() if k not in ("out", *NOT_OF_THE_COURSE)}
    for name, value in YOUNGER_SETTINGS.items():
        if settings[name] == value:
            del settings[name]
    return json.loads(json.dumps(settings))
