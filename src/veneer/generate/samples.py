"""Samples: several answers to each of many prompts, drawn from a model with its adapter as it is.

A runner computes all rows that decode in one step, as serving does. A prompt is read once for all
of its answers. Each answer has random numbers of its own, so that on a CPU, where the compiled step
gives the same numbers in any company, an answer does not depend on what is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.use import base_alone, in_use
from veneer.errors import ConfigError, ModelError
from veneer.formats.capture import capture
from veneer.generate.runners.choice import runner_for
from veneer.generate.runners.loaded import LoadedAdapter, made_ready
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.kernels.transfer import sent
from veneer.models.evaluating import evaluating

CHUNK = 256  # tokens of a prompt that are computed at once
ROWS = 32  # that decode at a time, where a group is not larger


def rows_drawn(count: int) -> int:
    """Return how many answers are drawn at a time, where each prompt gets `count`."""
    return max(1, ROWS // count) * count


@dataclass(eq=False)
class Sample:
    """An answer as it was drawn.

    tokens: with the one that ended it, if it was `ended` by the model and not for its length.
    logprobs: of each token, when it was drawn. entropies: of what each was drawn from, in nats.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False)
class _Row:
    """An answer that is being drawn: where its keys and values are, and its random numbers."""

    slot: int
    sample: Sample
    length: int  # tokens whose keys and values the slot holds
    uniforms: Sequence[float]
    most: int


class SampleDecoder:
    """Draws answers from a model, whose weights may change between two calls.

    ends: tokens that end an answer. rows: that decode at a time. `notices` says what a person
    should know of how steps are computed. What trains stays as it is. Raises ModelError for a model
    that keeps no keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, ends: Collection[int], *, context: int, rows: int = ROWS
    ) -> None:
        self.model, self.ends, self.context = model, frozenset(ends), context
        self.rows = rows
        with _thawed(model), base_alone(model), evaluating(model):
            try:
                self.runner, self.notices = runner_for(model, rows, context)
            except ModelError as error:
                raise ModelError(f"No samples can be drawn from this model: {error}") from error

    @torch.no_grad()
    def samples(
        self, prompts: Sequence[Sequence[int]], *, count: int, most: int, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """Return `count` answers to each prompt, drawn from the model's own distribution, at
        temperature 1.

        count: at most `rows`. most: tokens of an answer. seeds: one for each prompt.
        Raises ConfigError for a prompt that leaves no room for an answer.
        """
        if count > self.rows:
            raise ConfigError(f"{count} answers cannot be drawn at a time in {self.rows} slots.")
        adapter = self._adapter()
        groups = [[Sample() for _ in range(count)] for _ in prompts]
        waiting = list(range(len(prompts)))[::-1]
        free = list(range(self.rows))[::-1]
        active: list[_Row] = []
        with base_alone(self.model), evaluating(self.model):
            try:
                while waiting or active:
                    while waiting and len(free) >= count:
                        group = waiting.pop()
                        slots = [free.pop() for _ in range(count)]
                        active += self._begin(
                            *(prompts[group], slots, groups[group], adapter),
                            seed=seeds[group],
                            most=most,
                        )
                        active = self._without_ended(active, free)
                    if active:
                        self._step(active, adapter)
                        active = self._without_ended(active, free)
            finally:
                for row in active:
                    self.runner.free(row.slot)
        return groups

    def _adapter(self) -> LoadedAdapter | None:
        """Return the adapter that acts, as it is now."""
        if not in_use(self.model):
            return None
        return made_ready(self.model, capture(self.model, copy=False), "samples")

    def _begin(
        self,
        prompt: Sequence[int],
        slots: Sequence[int],
        samples: Sequence[Sample],
        adapter: LoadedAdapter | None,
        *,
        seed: int,
        most: int,
    ) -> list[_Row]:
        """Read a prompt once, and draw the first token of each of its answers."""
        left = self.context - len(prompt)
        if left < 1:
            raise ConfigError(
                f"A prompt of {len(prompt):,} tokens leaves no room for an answer in the context "
                f"of {self.context:,}."
            )
        for start in range(0, len(prompt), CHUNK):
            tokens = prompt[start : start + CHUNK]
            is_last = start + CHUNK >= len(prompt)
            logits = self.runner.step([Chunk(slots[0], tokens, start, adapter, int(is_last))])
        for slot in slots[1:]:
            self.runner.copy(slots[0], slot, len(prompt))
        most = min(most, left)
        rows = [
            _Row(slot, sample, len(prompt), _uniforms(seed, number, most), most)
            for number, (slot, sample) in enumerate(zip(slots, samples, strict=True))
        ]
        self._draw(logits.expand(len(rows), -1), rows)
        return rows

    def _step(self, rows: Sequence[_Row], adapter: LoadedAdapter | None) -> None:
        """Draw the next token of each row."""
        newest = [row.sample.tokens[-1] for row in rows]
        if isinstance(self.runner, SlotRunner):  # which takes tokens from the device alone
            device = self.model.device
            self.runner.take([row.slot for row in rows], sent(newest, device))
        logits = self.runner.step(
            [
                Chunk(row.slot, [token], row.length, adapter, 1, decoding=True)
                for row, token in zip(rows, newest, strict=True)
            ]
        )
        for row in rows:
            row.length += 1
        self._draw(logits, rows)

    def _draw(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        uniforms = [row.uniforms[len(row.sample.tokens)] for row in rows]
        drawn = drawn_by(logits, sent(uniforms, logits.device))
        for row, token, logprob, entropy in zip(rows, *drawn, strict=True):
            sample = row.sample
            sample.tokens.append(int(token))
            sample.logprobs.append(logprob)
            sample.entropies.append(entropy)
            sample.ended = token in self.ends

    def _without_ended(self, rows: Sequence[_Row], free: list[int]) -> list[_Row]:
        """Return the rows that go on; the slots of the others become free."""
        going = []
        for row in rows:
            if row.sample.ended or len(row.sample.tokens) == row.most:
                self.runner.free(row.slot)
                free.append(row.slot)
            else:
                going.append(row)
        return going


def drawn_by(logits: Tensor, uniforms: Tensor) -> list[list[float]]:
    """Return the token that each row draws, its log-probability, and the entropy of its row.

    logits (rows, vocab), float32; uniforms (rows,), from 0 up to 1: a token is drawn where the sum
    of all chances up to its own first exceeds it.
    """
    logs = logits.log_softmax(-1)
    chances = logs.exp()
    # A vocabulary's rounding errors would add up to that of a rare token.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    reached = chances.cumsum(-1, dtype=wide)  # (rows, vocab)
    bounds = uniforms.to(wide)[:, None] * reached[:, -1:]
    tokens = torch.searchsorted(reached, bounds, right=True).clamp(max=logits.shape[1] - 1)
    entropies = torch.special.entr(chances).sum(-1)
    own = logs.gather(1, tokens)[:, 0]
    return torch.stack([tokens[:, 0].to(wide), own.to(wide), entropies.to(wide)]).tolist()


def _uniforms(seed: int, number: int, count: int) -> list[float]:
    """Return the random numbers of an answer, from 0 up to 1."""
    return np.random.default_rng((seed, number)).random(count).tolist()


@contextmanager
def _thawed(model: PreTrainedModel) -> Iterator[None]:
    """Let train again behind the context what a runner freezes in it."""
    training = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        for weight in training:
            weight.requires_grad_(True)
