"""What a run on samples needs before its base is loaded: prompts, a course, and rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from veneer.data.columns import summarize
from veneer.data.encode import UNLABELLED
from veneer.data.preview import preview
from veneer.data.sources import spelt
from veneer.errors import ConfigError
from veneer.rewards.graders import Graded
from veneer.rewards.judged import Weighted
from veneer.rewards.named import rewards_named
from veneer.training.events import DataReady
from veneer.training.on_policy.prompts import Prompts, load_prompts
from veneer.training.on_policy.run import context_of, course_of
from veneer.training.preflight import Preflight
from veneer.training.recipe import Recipe
from veneer.training.reward_model import ModelReward
from veneer.training.rows import RunRows


@dataclass(frozen=True)
class PromptRows(RunRows):
    """The prompts of a run, as the rows that are prepared and planned for."""

    prompts: Prompts
    max_new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return super().longest + self.max_new_tokens

    def identity(self, before: str | None = None) -> str:
        """Return a hash of the prompts and their references."""
        return self.prompts.identity


def prompts_of(ahead: Preflight, rewards: Sequence[Weighted]) -> PromptRows:
    """Read the prompts of a run, to which `rewards` judge answers. Raises DataError with every
    prompt that cannot be used."""
    recipe, tokenizer = ahead.recipe, ahead.tokenizer
    (path,) = spelt(recipe.data)
    most = recipe.on_policy.max_new_tokens
    prompts = load_prompts(
        Path(path),
        tokenizer,
        context=min(context_of(ahead.config), recipe.rows.max_length + most),
        max_new_tokens=most,
        limit=recipe.rows.limit,
        graded=[each.reward for each in rewards if isinstance(each.reward, Graded)],
    )
    first = prompts.examples[0]
    asked = replace(first, labels=[UNLABELLED] * len(first.tokens))
    summary = replace(summarize(prompts.examples), label_tokens=0)
    ready = DataReady(summary, None, 0, preview(asked, tokenizer), None)
    return PromptRows(prompts.examples, [], (), [], ready, None, prompts, most)


def with_course(ahead: Preflight) -> Preflight:
    """Return a run with the steps, and tokens of a pass, that runs on samples have."""
    recipe = ahead.recipe
    rows = replace(recipe.rows, eval_rows=0)
    recipe = replace(recipe, training=course_of(recipe.training), rows=rows)
    return replace(ahead, recipe=recipe)


@contextmanager
def rewards_of(recipe: Recipe, *, processes: int) -> Iterator[list[Weighted]]:
    """Yield the rewards of a run, none where it learns from its rows; end them behind it.

    Raises ConfigError for those that cannot be used, and for several processes.
    """
    if recipe.objective.shape != "prompts":
        yield []
        return
    if processes > 1:
        raise ConfigError("Samples are learnt from in one process; leave out --processes.")
    config = recipe.on_policy
    model = partial(ModelReward, device=recipe.device)
    with rewards_named(config.reward, config.weights, config.seconds, model=model) as rewards:
        yield rewards
