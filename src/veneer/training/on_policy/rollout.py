"""The samples of one step: drawn, and where rewards judge them compared with each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.use import base_alone
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.fused.forward import Forward
from veneer.generate.samples import Sample, SampleDecoder
from veneer.models.evaluating import evaluating
from veneer.objectives import policy
from veneer.objectives.criterion import label_counts
from veneer.objectives.on_policy import Drawn
from veneer.objectives.policy_config import OnPolicy
from veneer.rewards.judged import Answered, Judged, Weighted, judge
from veneer.training.on_policy.prompts import Prompts
from veneer.training.step import seed_of

BEFORE_THE_FIRST = 0  # the step whose random numbers evaluations have; none is learnt in it
ReferenceOf = Callable[[Sequence[Example]], list[list[float]]]


@dataclass(frozen=True, eq=False)
class Rollout:
    """The samples of a step, group by group.

    examples: prompt and answer, of which the answer is learnt. metrics: of the rewards, if there
    are any, the answers and the sampler. lines: a JSON object for each sample, for people to read.
    """

    examples: Sequence[Example]
    drawn: Drawn
    metrics: Mapping[str, float]
    lines: Sequence[dict[str, Any]]
    judged: Judged


@dataclass(frozen=True, eq=False)
class _Draw:
    """Answers, group by group, and what they are worth. tokens, seconds: that drawing them took,
    with those that others have replaced."""

    samples: Sequence[Sample]
    answers: Sequence[Answered]
    judged: Judged
    tokens: int
    seconds: float

    def replaced(self, places: Sequence[int], others: _Draw) -> _Draw:
        """Return the answers with others in these places."""
        samples, answers = list(self.samples), list(self.answers)
        for place, sample, answer in zip(places, others.samples, others.answers, strict=True):
            samples[place], answers[place] = sample, answer
        judged = self.judged.replaced(places, others.judged)
        tokens, seconds = self.tokens + others.tokens, self.seconds + others.seconds
        return _Draw(samples, answers, judged, tokens, seconds)


@dataclass(frozen=True, eq=False)
class Roller:
    """Draws samples of a run's prompts, and judges them, unless there are no rewards."""

    decoder: SampleDecoder
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: Sequence[Weighted]
    config: OnPolicy
    of_answers: bool
    seed: int

    def roll(self, step: int, rows: Sequence[int], reference_of: ReferenceOf) -> Rollout:
        """Return the samples of a step: answers to the prompts `rows`."""
        config, size = self.config, self.config.group_size
        drawn = self._draw(self.prompts, rows, step, count=size)
        again = 0
        for attempt in range(1, config.resample + 1):
            shaped = self._shaped(drawn.judged.rewards, drawn.samples, None).view(-1, size)
            groups = _are_equal(shaped).nonzero()[:, 0].tolist()
            if not groups:
                break
            again += len(groups)
            same = [rows[group] for group in groups]
            others = self._draw(self.prompts, same, step, attempt, count=size)
            drawn = drawn.replaced([g * size + i for g in groups for i in range(size)], others)
        samples, answers, judged = drawn.samples, drawn.answers, drawn.judged
        asked = [row for row in rows for _ in range(size)]
        examples = [
            learnt(self.prompts.examples[row], sample)
            for row, sample in zip(asked, samples, strict=True)
        ]
        reference = reference_of(examples) if config.kl_weight else None
        rewards = self._shaped(judged.rewards, samples, reference)
        advantages = policy.advantages(
            rewards.view(len(rows), config.group_size),
            baseline="others" if self.of_answers else "group",
            scale=config.scale_rewards and not self.of_answers,
        )
        known = Drawn(
            advantages.flatten().tolist(), [sample.logprobs for sample in samples], reference
        )
        metrics = _metrics(samples, judged)
        if self.rewards:
            metrics["equal_groups"] = float(_are_equal(rewards.view_as(advantages)).double().mean())
        if config.resample:
            metrics["resampled_groups"] = float(again)
        metrics["sample_tokens_per_second"] = drawn.tokens / drawn.seconds
        values = zip(answers, samples, known.advantages, strict=True)
        lines = [
            {
                "step": step,
                "row": answer.place,
                "prompt": answer.prompt,
                "answer": answer.text,
                "tokens": len(sample.tokens),
                "ended": sample.ended,
            }
            | (_worth(judged, i, advantage) if self.rewards else {})
            for i, (answer, sample, advantage) in enumerate(values)
        ]
        return Rollout(examples, known, metrics, lines, judged)

    def held_out(self, prompts: Prompts) -> Rollout:
        """Return answers to other prompts, drawn each time with the same random numbers."""
        rows = range(len(prompts.examples))
        drawn = self._draw(prompts, rows, BEFORE_THE_FIRST, count=self.config.eval_answers)
        asked = [row for row in rows for _ in range(self.config.eval_answers)]
        pairs = zip(asked, drawn.samples, strict=True)
        examples = [learnt(prompts.examples[row], sample) for row, sample in pairs]
        known = Drawn((), [sample.logprobs for sample in drawn.samples])
        return Rollout(examples, known, _metrics(drawn.samples, drawn.judged), (), drawn.judged)

    def _draw(
        self, prompts: Prompts, rows: Sequence[int], step: int, *attempt: int, count: int
    ) -> _Draw:
        """Return so many answers to each of these prompts, by random numbers of the step's own."""
        begun = time.perf_counter()
        groups = self.decoder.samples(
            [prompts.examples[row].tokens for row in rows],
            count=count,
            most=self.config.max_new_tokens,
            seeds=[seed_of(self.seed, step, row, *attempt) for row in rows],
        )
        seconds = time.perf_counter() - begun
        samples = [sample for group in groups for sample in group]
        answers = self._answers(prompts, [row for row in rows for _ in range(count)], samples)
        judged = judge(answers, self.rewards, on_fault=self.config.on_reward_fault)
        tokens = sum(len(sample.tokens) for sample in samples)
        return _Draw(samples, answers, judged, tokens, seconds)

    def _answers(
        self, prompts: Prompts, asked: Sequence[int], samples: Sequence[Sample]
    ) -> list[Answered]:
        """Return samples as rewards judge them. asked: the prompt of each."""
        texts = self.tokenizer.batch_decode(
            [sample.tokens for sample in samples],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        answers = []
        for row, text in zip(asked, texts, strict=True):
            question, place = prompts.questions[row], prompts.examples[row].where
            turns = prompts.messages(row)
            answers.append(Answered(text, turns, question.references, question.item, place))
        return answers

    def _shaped(
        self,
        rewards: Sequence[float],
        samples: Sequence[Sample],
        reference: Sequence[Sequence[float]] | None,
    ) -> torch.Tensor:
        """Return rewards (samples,) less what long answers and, of whole answers, the distance from
        the reference take from them."""
        config = self.config
        shaped = torch.tensor(rewards, dtype=torch.float64)
        if config.overlong_margin:
            lengths = torch.tensor([len(sample.tokens) for sample in samples])
            shaped -= policy.overlong_penalty(
                lengths, longest=config.max_new_tokens, margin=config.overlong_margin
            )
        if self.of_answers and reference is not None:
            pairs = zip(samples, reference, strict=True)
            kl = [math.fsum(own.logprobs) - math.fsum(theirs) for own, theirs in pairs]
            shaped -= config.kl_weight * torch.tensor(kl, dtype=torch.float64)
        return shaped


def learnt(prompt: Example, sample: Sample) -> Example:
    """Return a prompt with an answer, of which the answer is learnt."""
    labels = [UNLABELLED] * len(prompt.tokens) + sample.tokens
    return Example(prompt.tokens + sample.tokens, labels, prompt.where, 0)


@torch.no_grad()
def base_log_probabilities(
    model: PreTrainedModel,
    forward: Forward,
    examples: Sequence[Example],
    batches: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Return the log-probability of each label token of each example by the base alone."""
    values: dict[int, list[float]] = {}
    with base_alone(model), evaluating(model):
        for indices in batches:
            batch = pack(examples, indices)
            log_p = (-forward.losses(model, batch)).tolist()
            ends = np.cumsum(label_counts(batch)).tolist()
            for row, start, end in zip(batch.rows.tolist(), [0, *ends], ends, strict=False):
                values[row] = log_p[start:end]
    return [values[row] for row in range(len(examples))]


def _metrics(samples: Sequence[Sample], judged: Judged) -> dict[str, float]:
    """Return what is measured of samples; a reward that no answer has is left out."""
    lengths = [len(sample.tokens) for sample in samples]
    known = [reward for reward in judged.rewards if not math.isnan(reward)]
    metrics: dict[str, float] = {}
    if known and judged.by_name:
        metrics["reward"] = fmean(known)
        spread = float(np.std(np.asarray(known)))
        metrics["reward_deviation"] = spread
    for name, values in judged.by_name.items():
        if own := [value for value in values if not math.isnan(value)]:
            metrics[f"reward/{name}"] = fmean(own)
    metrics |= {
        "answer_tokens": fmean(lengths),
        "longest_answer": float(max(lengths)),
        "cut_answers": fmean(not sample.ended for sample in samples),
        "entropy": sum(sum(sample.entropies) for sample in samples) / sum(lengths),
    }
    if judged.by_name:
        metrics["reward_faults"] = float(sum(judged.faults.values()))
    return metrics


def _worth(judged: Judged, number: int, advantage: float) -> dict[str, Any]:
    """Return what is written of an answer's rewards."""
    return {
        "reward": _or_none(judged.rewards[number]),
        "advantage": round(advantage, 4),
        "rewards": {name: _or_none(own[number]) for name, own in judged.by_name.items()},
    }


def _are_equal(shaped: torch.Tensor) -> torch.Tensor:
    """Return in which groups all known rewards are equal, (groups,). shaped: (groups, answers)."""
    return shaped.nan_to_num(-math.inf).amax(1) - shaped.nan_to_num(math.inf).amin(1) <= 0


def _or_none(value: float) -> float | None:
    """Return a number as JSON has it."""
    return None if math.isnan(value) else value
