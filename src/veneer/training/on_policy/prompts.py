"""The prompts of a run on samples: what is asked, as tokens, and what rewards may compare with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from veneer.data.chat import prompt_text
from veneer.data.encode import Example
from veneer.data.problems import Located, Problem, data_error
from veneer.data.questions import Question, read_prompts
from veneer.data.sources import Split
from veneer.errors import ConfigError, DataError
from veneer.rewards.graders import Graded


@dataclass(frozen=True)
class Prompts:
    """What is asked. examples: the tokens of each prompt. questions: its turns and references."""

    examples: Sequence[Example]
    questions: Sequence[Question]
    identity: str = field(default="", compare=False)

    def messages(self, index: int) -> list[dict[str, str]]:
        """Return the turns of a prompt, as reward functions take them."""
        turns = self.questions[index].turns
        return [{"role": turn.role, "content": turn.content} for turn in turns]


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    split: Split = "train",
    limit: int | None = None,
    graded: Sequence[Graded] = (),
) -> Prompts:
    """Return the prompts of a file as the model's chat template writes them.

    A row is any that `veneer generate` reads; an answer that it has is a reference. context: the
    tokens of a prompt with its answer. split: which files of a directory. graded: rewards that read
    fields of rows. Raises DataError with every prompt that cannot be used.
    """
    return encoded(
        read_prompts(path, split=split)[:limit],
        tokenizer,
        context=context,
        max_new_tokens=max_new_tokens,
        graded=graded,
    )


def encoded(
    prompts: Sequence[Located[Question]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    graded: Sequence[Graded] = (),
) -> Prompts:
    """Return prompts as tokens. Raises as `load_prompts` does."""
    examples, problems = [], []
    for prompt in prompts:
        try:
            text = prompt_text(tokenizer, list(prompt.value.turns))
        except (ConfigError, DataError) as error:
            problems.append(Problem(prompt.place, str(error)))
            continue
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(tokens) + max_new_tokens > context:
            why = (
                f"the prompt has {len(tokens):,} tokens, which leaves no room for an answer of "
                f"{max_new_tokens:,} in {context:,}, which are max_length and max_new_tokens, or "
                "the model's context"
            )
            problems.append(Problem(prompt.place, why))
        elif len(tokens) < 2:
            problems.append(Problem(prompt.place, "the prompt is a single token"))
        lacks = filter(None, (each.lacks(prompt.value.item) for each in graded))
        problems += [Problem(prompt.place, what) for what in lacks]
        # No loss is ever taken of a prompt: what is learnt are the answers to it.
        examples.append(Example(tokens, tokens, str(prompt.place), 0))
    if problems:
        count = len({problem.place for problem in problems})
        raise data_error(f"{count} of {len(prompts)} prompts cannot be used:", problems)
    if not examples:
        raise DataError("There are no prompts to answer.")
    questions = [prompt.value for prompt in prompts]
    if not graded:  # nothing reads them, and many rows have much
        questions = [replace(question, item={}) for question in questions]
    return Prompts(examples, questions, _hash_of(examples, questions))


def _hash_of(examples: Sequence[Example], questions: Sequence[Question]) -> str:
    """Return a hash of all that decides what is drawn and how it is judged."""
    rows = [
        [example.tokens, list(question.references), *([question.item] if question.item else [])]
        for example, question in zip(examples, questions, strict=True)
    ]
    # Tables have dates and the like, which are no JSON.
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()[:16]
