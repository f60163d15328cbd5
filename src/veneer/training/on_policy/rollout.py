"""The samples of one step: drawn, judged, and compared with each other."""

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

ReferenceOf = Callable[[Sequence[Example]], list[list[float]]]


@dataclass(frozen=True, eq=False)
class Rollout:
    """The samples of a step, group by group.

    examples: prompt and answer, of which the answer is learnt. metrics: of the rewards, the answers
    and the sampler. lines: a JSON object for each sample, for people to read.
    """

    examples: Sequence[Example]
    drawn: Drawn
    metrics: Mapping[str, float]
    lines: Sequence[dict[str, Any]]
    judged: Judged


@dataclass(frozen=True, eq=False)
class Roller:
    """Draws and judges samples of a run's prompts."""

    decoder: SampleDecoder
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: Sequence[Weighted]
    config: OnPolicy
    of_answers: bool
    seed: int

    def roll(self, step: int, rows: Sequence[int], reference_of: ReferenceOf) -> Rollout:
        """Return the samples of a step: answers to the prompts `rows`."""
        config, prompts = self.config, self.prompts
        begun = time.perf_counter()
        groups = self.decoder.samples(
            [prompts.examples[row].tokens for row in rows],
            count=config.group_size,
            most=config.max_new_tokens,
            seeds=[seed_of(self.seed, step, row) for row in rows],
        )
        seconds = time.perf_counter() - begun
        samples = [sample for group in groups for sample in group]
        asked = [row for row in rows for _ in range(config.group_size)]
        texts = self.tokenizer.batch_decode(
            [sample.tokens for sample in samples],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        answers = [self._answered(row, text) for row, text in zip(asked, texts, strict=True)]
        judged = judge(answers, self.rewards, on_fault=config.on_reward_fault)
        examples = [
            learnt(prompts.examples[row], sample)
            for row, sample in zip(asked, samples, strict=True)
        ]
        reference = reference_of(examples) if config.kl_weight else None
        rewards = self._shaped(judged.rewards, samples, reference)
        advantages = policy.advantages(
            rewards.view(len(rows), config.group_size),
            baseline="others" if self.of_answers else "group",
            scale=config.scale_rewards and not self.of_answers,
        )
        drawn = Drawn(
            advantages.flatten().tolist(), [sample.logprobs for sample in samples], reference
        )
        metrics = _metrics(samples, judged, rewards.view_as(advantages), config)
        metrics["sample_tokens_per_second"] = sum(len(s.tokens) for s in samples) / seconds
        values = zip(answers, samples, judged.rewards, drawn.advantages, strict=True)
        lines = [
            {
                "step": step,
                "row": answer.place,
                "prompt": answer.prompt,
                "answer": answer.text,
                "tokens": len(sample.tokens),
                "ended": sample.ended,
                "reward": _or_none(reward),
                "advantage": round(advantage, 4),
                "rewards": {name: _or_none(own[i]) for name, own in judged.by_name.items()},
            }
            for i, (answer, sample, reward, advantage) in enumerate(values)
        ]
        return Rollout(examples, drawn, metrics, lines, judged)

    def _answered(self, row: int, text: str) -> Answered:
        prompts = self.prompts
        question, place = prompts.questions[row], prompts.examples[row].where
        return Answered(text, prompts.messages(row), question.references, question.item, place)

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


def _metrics(
    samples: Sequence[Sample], judged: Judged, shaped: torch.Tensor, config: OnPolicy
) -> dict[str, float]:
    """Return what is measured of a step's samples; a reward that no answer has is left out."""
    lengths = [len(sample.tokens) for sample in samples]
    known = [reward for reward in judged.rewards if not math.isnan(reward)]
    metrics: dict[str, float] = {}
    if known:
        metrics["reward"] = fmean(known)
        spread = float(np.std(np.asarray(known)))
        metrics["reward_deviation"] = spread
    for name, values in judged.by_name.items():
        if own := [value for value in values if not math.isnan(value)]:
            metrics[f"reward/{name}"] = fmean(own)
    spread_of_group = shaped.nan_to_num(-math.inf).amax(1) - shaped.nan_to_num(math.inf).amin(1)
    metrics |= {
        "equal_groups": float((spread_of_group <= 0).double().mean()),
        "answer_tokens": fmean(lengths),
        "longest_answer": float(max(lengths)),
        "cut_answers": fmean(not sample.ended for sample in samples),
        "entropy": sum(sum(sample.entropies) for sample in samples) / sum(lengths),
        "reward_faults": float(sum(judged.faults.values())),
    }
    return metrics


def _or_none(value: float) -> float | None:
    """Return a number as JSON has it."""
    return None if math.isnan(value) else value
