"""A teacher that an OpenAI-compatible server has: it is sent the rows as tokens, and gives the log-
probabilities of what it takes to be likeliest in the place of each (`echo` with `logprobs`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from veneer.data.columns import lengths_of
from veneer.data.encode import UNLABELLED, Example
from veneer.errors import ConfigError, TrainingError, listed, nearest
from veneer.objectives.config import Objective
from veneer.training.json_over_http import KEY, Refused, ask

LOOK_SECONDS, ROWS_SECONDS = 60.0, 600.0  # for an answer: to a look at the server, to rows
MOST_ROWS, MOST_TOKENS = 16, 4096  # of one question
# Bytes of an answer: of each number, as vLLM writes it twice, with a rank and a text; and of the
# rest. What is longer holds something else.
NUMBER_BYTES, OTHER_BYTES = 400, 10**6
NAME = "token_id:"  # before the number of a token, as vLLM writes it
# What all other tokens have together is 1 less what the likeliest have, which float32 rounds.
LEAST = 2.0**-24
# In the mean over a row's tokens, how far a model's probabilities are moved by another batch in 16
# bits is far below, and another model far above.
SAME = 0.05
# Every tokenizer has its own idea of how these are cut.
PROBE = "Größe 漢字, 3,141.59:\n\treturn x  ✓"


@dataclass(frozen=True)
class ServedTeacher:
    """A server's model. context: the most tokens of a row, None where the server does not say.

    count: how many likeliest tokens it is asked for. vocab: how many tokens the student has.
    """

    address: str
    model: str
    digest: str
    context: int | None
    count: int
    vocab: int

    @classmethod
    def of(cls, objective: Objective, config: PretrainedConfig) -> ServedTeacher:
        """Return an objective's teacher. config: the student's.

        Raises ConfigError or TrainingError where the server cannot be asked, or has no such model.
        """
        assert objective.teacher is not None
        assert objective.teacher_top_k is not None
        address = objective.teacher.rstrip("/")
        try:
            reply = ask(address, "/models", seconds=LOOK_SECONDS, most=OTHER_BYTES)
        except Refused as refused:
            raise _not_for_us(refused, "an address of this form ends in /v1") from refused
        model = _chosen(address, reply, objective.teacher_model)
        vocab = config.get_text_config().vocab_size
        marks = json.dumps([address, model["id"], str(model.get("root"))])
        digest = hashlib.sha256(marks.encode()).hexdigest()[:16]
        context = model.get("max_model_len")
        context = context if isinstance(context, int) and context > 0 else None
        count = min(objective.teacher_top_k, vocab)
        return cls(address, model["id"], digest, context, count, vocab)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError or TrainingError where the server does not give what is needed, or its
        model has other tokens than the student."""
        ways = [tokenizer(PROBE, add_special_tokens=adds)["input_ids"] for adds in (True, False)]
        (choice,) = self._choices(PROBE, 1, seconds=LOOK_SECONDS, tokens=8 * len(PROBE))
        theirs = self._numbers(choice)
        if theirs not in ways:
            own = ways[1] if len(theirs) == len(ways[1]) else ways[0]
            pairs = zip(own, theirs, strict=False)
            at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(own), len(theirs)))
            raise ConfigError(
                f"{self} cannot teach: of a text that was tried it makes {len(theirs)} tokens and "
                f"the student {len(own)}, which differ from token {at} on. Its model must have the "
                "student's tokens; take one of the same family."
            )
        self._likeliest(choice, theirs, range(1, len(theirs)), "the text that was tried")

    def check_lengths(self, examples: Sequence[Example]) -> None:
        """Raise ConfigError for rows that are longer than the server's context."""
        longest = max(map(int, lengths_of(examples)), default=0)
        if self.context is not None and longest > self.context:
            raise ConfigError(
                f"{self} takes rows of {self.context:,} tokens, but the longest has {longest:,}. "
                "Cut rows by --max-length, or let the server take more."
            )

    def records(
        self, examples: Sequence[Example], batches: Iterable[Sequence[int]]
    ) -> Iterator[NDArray[np.void]]:
        """Yield what the server's model gives the label tokens of rows, in the order of `batches`.
        A label at a row's first token, which nothing predicts, has a record of zeros."""
        dtype = [("tokens", "<i4", (self.count,)), ("log_p", "<f4", (self.count + 1,))]
        for indices in batches:
            rows = [examples[index] for index in indices]
            prompts = [list(row.tokens) for row in rows]
            tokens = sum(map(len, prompts))
            choices = self._choices(prompts, len(rows), seconds=ROWS_SECONDS, tokens=tokens)
            for row, own, choice in zip(rows, prompts, choices, strict=True):
                labelled = [n for n, label in enumerate(row.labels) if label != UNLABELLED]
                places = [n for n in labelled if n > 0]
                # Some servers add a token that they draw in any case.
                if self._numbers(choice)[: len(own)] != own:
                    raise TrainingError(
                        f"{self} gives back other tokens than it was sent, in {row.where}."
                    )
                records = np.zeros(len(labelled), dtype=dtype)
                given = self._likeliest(choice, own, places, row.where)
                behind = slice(len(labelled) - len(places), None)
                records["tokens"][behind], records["log_p"][behind] = given
                yield records

    def check_unchanged(self, examples: Sequence[Example], kept: NDArray[np.void]) -> None:
        """Raise ConfigError where the server's model gives the first row other probabilities than
        those that were kept."""
        now = next(self.records(examples, [[0]]))
        far = sum(map(_distance, kept[: len(now)], now)) / max(1, len(now))
        if far > SAME:
            raise ConfigError(
                f"{self} gives other probabilities than it gave before ({far:.0%} of them "
                "elsewhere), so that another model seems to be behind this name. Serve the earlier "
                "one, or give this one another name."
            )

    def __str__(self) -> str:
        return f"{self.model} of {self.address}"

    def _choices(self, prompt: Any, count: int, *, seconds: float, tokens: int) -> list[Any]:
        """Return what a completion of each prompt says of log-probabilities. tokens: of all."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 0,
            "echo": True,
            "logprobs": self.count,
            "return_tokens_as_token_ids": True,
        }
        most = tokens * (self.count + 2) * NUMBER_BYTES + OTHER_BYTES
        try:
            reply = ask(self.address, "/completions", body, seconds=seconds, most=most)
        except Refused as refused:
            raise _not_for_us(refused, self._hint(refused)) from refused
        choices = reply.get("choices") if isinstance(reply, dict) else None
        by_index = {
            choice["index"]: choice.get("logprobs")
            for choice in (choices if isinstance(choices, list) else ())
            if isinstance(choice, dict) and isinstance(choice.get("index"), int)
        }
        if sorted(by_index) != [*range(count)]:
            raise TrainingError(f"{self} answers no completion of each prompt that it was sent.")
        if not all(isinstance(each, dict) for each in by_index.values()):
            raise ConfigError(
                f"{self} cannot teach: it gives no log-probabilities of a prompt (echo with "
                "logprobs, as vLLM and veneer serve have)."
            )
        return [by_index[n] for n in range(count)]

    def _hint(self, refused: Refused) -> str:
        if refused.status in (404, 405):
            return "it has no completions, and a chat gives no log-probabilities of given answers"
        if "logprobs" in refused.says:
            return (
                f"it was asked for {self.count} likeliest tokens, of which servers give only so "
                "many (vLLM 20, unless --max-logprobs says otherwise); take a lower --teacher-top-k"
            )
        return "a teacher has to take echo with logprobs, as vLLM and veneer serve do"

    def _numbers(self, choice: dict[str, Any]) -> list[int]:
        """Return the numbers of the tokens of a choice."""
        names = choice.get("tokens")
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f"{self} cannot teach: it gives no tokens of a prompt, as if it did not know echo."
            )
        numbers = [_number(name) for name in names]
        if None in numbers:
            raise ConfigError(
                f"{self} cannot teach: it names tokens by their texts, which several may share. It "
                "has to know return_tokens_as_token_ids, as vLLM and veneer serve do."
            )
        return [number for number in numbers if number is not None]

    def _likeliest(
        self, choice: dict[str, Any], own: Sequence[int], places: Sequence[int], where: str
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the likeliest tokens at places of a prompt, (places, count), and their
        log-probabilities with that of all others, (places, count + 1)."""
        top = choice.get("top_logprobs")
        if not isinstance(top, list) or len(top) < len(own):
            raise TrainingError(f"{self} gives no likeliest tokens for all of {where}.")
        tokens = np.empty((len(places), self.count), dtype=np.int32)
        log_p = np.full((len(places), self.count + 1), -math.inf)
        for n, place in enumerate(places):
            given = top[place] if isinstance(top[place], dict) else {}
            pairs = [(_number(name), value) for name, value in given.items()]
            if wrong := [f"{name}: {value}" for name, value in given.items() if not _is_log(value)]:
                raise TrainingError(
                    f"{self} gives what is no logarithm of a probability in {where}, at token "
                    f"{place}: {listed(wrong)}."
                )
            if others := [str(t) for t, _ in pairs if t is None or not 0 <= t < self.vocab]:
                raise ConfigError(
                    f"{self} cannot teach: in {where} it gives tokens that the student does not "
                    f"have ({listed(others)})."
                )
            if len(pairs) < self.count:
                raise ConfigError(
                    f"{self} gives {len(pairs)} likeliest tokens where {self.count} are asked for. "
                    f"Take --teacher-top-k {max(1, len(pairs))}, or let it give more (vLLM: "
                    "--max-logprobs)."
                )
            # vLLM gives a prompt's own token too, where it is not among the likeliest.
            best = sorted(pairs, key=lambda pair: -pair[1])[: self.count]
            tokens[n], log_p[n, :-1] = zip(*best, strict=True)
        together = np.exp(log_p).sum(1)
        if (together > 1.001).any():
            raise TrainingError(
                f"{self} gives probabilities that come to more than 1 ({together.max():.3g}) in "
                f"{where}."
            )
        if self.count < self.vocab:
            log_p[:, -1] = np.log(np.maximum(1 - together, LEAST))
        return tokens, log_p.astype(np.float32)


def _chosen(address: str, reply: Any, name: str | None) -> dict[str, Any]:
    """Return the model that a server is to teach by, of those that it lists."""
    data = reply.get("data") if isinstance(reply, dict) else None
    models = {
        each["id"]: each
        for each in (data if isinstance(data, list) else ())
        if isinstance(each, dict) and isinstance(each.get("id"), str)
    }
    if not models:
        raise ConfigError(f"{address}/models lists no models, as an OpenAI-compatible server does.")
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        what = (
            "has several models" if name is None else f"has no model {name}{nearest(name, models)}"
        )
        raise ConfigError(
            f"{address} {what}. Name one of these by --teacher-model: {listed(models, most=20)}."
        )
    return models[name]


def _not_for_us(refused: Refused, hint: str) -> ConfigError:
    """Return the error for a question that a server refuses. hint: what may be the reason."""
    if refused.status in (401, 403):
        known = "another key than" if os.environ.get(KEY) else "a key by"
        hint = f"it wants {known} the environment variable {KEY}"
    elif 300 <= refused.status < 400 or refused.status >= 500:
        return ConfigError(str(refused))
    return ConfigError(f"{str(refused).rstrip('.')}: {hint}.")


def _number(name: Any) -> int | None:
    """Return the number that a name of a token says, None where it says none."""
    digits = name.removeprefix(NAME) if isinstance(name, str) else ""
    is_number = digits != name and digits.isascii() and digits.isdigit() and len(digits) < 10
    return int(digits) if is_number else None


def _is_log(value: Any) -> bool:
    """Return whether a value may be the logarithm of a probability, which rounding may lift."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= 1e-4


def _distance(one: np.void, other: np.void) -> float:
    """Return half of how far two records are, as distributions: 0 for the same, 1 at most."""
    first, second = (
        dict(zip([*each["tokens"].tolist(), None], np.exp(each["log_p"]).tolist(), strict=True))
        for each in (one, other)
    )
    return sum(abs(first.get(t, 0.0) - second.get(t, 0.0)) for t in {*first, *second}) / 2
