"""What a run on samples needs before its base is loaded: prompts, a course, and rewards, if it has
some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from veneer.data.columns import Summary, summarize
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
    """The prompts of a run, as the rows that are prepared and planned for; and those that it is
    evaluated on, if there are any."""

    prompts: Prompts
    to_evaluate: Prompts | None
    max_new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return super().longest + self.max_new_tokens

    def identity(self, before: str | None = None) -> str:
        """Return a hash of the prompts and their references."""
        others = "" if self.to_evaluate is None else f"-{self.to_evaluate.identity}"
        return self.prompts.identity + others


def prompts_of(ahead: Preflight, rewards: Sequence[Weighted]) -> PromptRows:
    """Read the prompts of a run, to which `rewards` judge answers. Raises DataError with every
    prompt that cannot be used, and ConfigError where the run starts from new tokens."""
    recipe, tokenizer = ahead.recipe, ahead.tokenizer
    if ahead.start is not None and ahead.start.new_tokens is not None:
        raise ConfigError(
            f"{recipe.start_from} has new tokens, which prompts and samples do not have yet. Start "
            "from an adapter without, or leave out --from."
        )
    (path,) = spelt(recipe.data)
    most, eval_data = recipe.on_policy.max_new_tokens, recipe.rows.eval_data
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        context=min(context_of(ahead.config), recipe.rows.max_length + most),
        max_new_tokens=most,
        graded=[each.reward for each in rewards if isinstance(each.reward, Graded)],
    )
    prompts = load(Path(path), limit=recipe.rows.limit)
    others = None if eval_data is None else load(eval_data, split="valid")
    first = prompts.examples[0]
    asked = preview(replace(first, labels=[UNLABELLED] * len(first.tokens)), tokenizer)
    of_others = None if others is None else _summary(others)
    ready = DataReady(_summary(prompts), of_others, 0, asked, eval_data)
    held_out = [] if others is None else others.examples
    return PromptRows(
        *(prompts.examples, held_out, (), [], ready, None),
        prompts=prompts,
        to_evaluate=others,
        max_new_tokens=most,
    )


def _summary(prompts: Prompts) -> Summary:
    """Return what prompts are, of which nothing is learnt."""
    return replace(summarize(prompts.examples), label_tokens=0)


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
