"""Answers to the prompts of a file, as lines of JSON in the file's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.virtual_context import virtual_count
from veneer.data.problems import Located, Problem, data_error
from veneer.data.questions import Question
from veneer.errors import ConfigError, DataError
from veneer.generate.decode import Answer, answers_as_ready, check_prompts
from veneer.generate.sampling import Sampling

# Batches' worth of prompts that are sorted by length at a time: more waste less padding, fewer
# bring the first answers sooner.
BATCHES_SORTED = 4


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Located[Question]],
    *,
    sampling: Sampling,
    batch: int,
) -> Iterator[dict[str, Any]]:
    """Return an iterator over what `record` returns for each prompt, in order, each as soon as it
    can be.

    Raises DataError, at once, with every prompt that the chat template refuses or that leaves no
    room for an answer.
    """
    problems = []
    for prompt in prompts:
        try:
            check_prompts(model, tokenizer, [prompt.value.turns], virtual=virtual_count(model))
        except (ConfigError, DataError) as error:
            problems.append(Problem(prompt.place, str(error)))
    if problems:
        heading = f"{len(problems)} of {len(prompts)} prompts cannot be answered:"
        raise data_error(heading, problems)
    questions = [prompt.value.turns for prompt in prompts]
    window = BATCHES_SORTED * batch
    answers = answers_as_ready(
        model, tokenizer, questions, sampling=sampling, batch=batch, window=window
    )
    return _in_order(prompts, answers)


def _in_order(
    prompts: Sequence[Located[Question]], answers: Iterator[tuple[int, Answer]]
) -> Iterator[dict[str, Any]]:
    ready: dict[int, Answer] = {}
    following = 0
    for i, answer in answers:
        ready[i] = answer
        while following in ready:
            yield record(prompts[following], ready.pop(following))
            following += 1


def record(prompt: Located[Question], answer: Answer) -> dict[str, Any]:
    """Return a prompt with its answer as a row that `tune` can read: prompt and completion."""
    turns, references = prompt.value.turns, prompt.value.references
    alone = len(turns) == 1 and turns[0].role == "user"
    messages = [{"role": turn.role, "content": turn.content, **turn.fields} for turn in turns]
    right = {"reference": references[0]} if len(references) == 1 else {"references": references}
    return {
        "source": str(prompt.place),
        "prompt": turns[0].content if alone else messages,
        "completion": answer.text,
        "finish_reason": answer.finish_reason,
        **(right if references else {}),
    }
