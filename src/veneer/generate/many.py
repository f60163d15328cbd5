"""Answers to the prompts of a file, as lines of JSON in the file's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def check_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Located[Question]],
) -> None:
    """Raise DataError with every prompt that the chat template refuses or that leaves no room for
    an answer."""
    problems = []
    for prompt in prompts:
        try:
            check_prompts(model, tokenizer, [prompt.value.turns], virtual=virtual_count(model))
        except (ConfigError, DataError) as error:
            problems.append(Problem(prompt.place, str(error)))
    if problems:
        heading = f"{len(problems)} of {len(prompts)} prompts cannot be answered:"
        raise data_error(heading, problems)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Located[Question]],
    *,
    sampling: Sampling,
    batch: int,
    answered: Callable[[int], None],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Call `write` with what `record` returns for each prompt, in order, each as soon as it can be:
    when it and those before it have ended.

    `answered` is called with how many prompts are, in any order.
    """
    answers: dict[int, Answer] = {}
    written = 0

    def ready(i: int, answer: Answer) -> None:
        nonlocal written
        if i in answers:  # it ended before its batch
            return
        answers[i] = answer
        answered(len(answers))
        while written in answers:
            write(record(prompts[written], answers[written]))
            written += 1

    questions = [prompt.value.turns for prompt in prompts]
    for i, answer in answers_as_ready(
        model,
        tokenizer,
        questions,
        sampling=sampling,
        batch=batch,
        window=BATCHES_SORTED * batch,
        early=ready,
    ):
        ready(i, answer)


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
