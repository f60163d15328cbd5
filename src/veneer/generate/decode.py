"""Answers to conversations: one piece by piece, or many in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from veneer.adapter.virtual_context import takes_padding, virtual_count
from veneer.data.chat import prompt_text
from veneer.data.messages import read_turns
from veneer.data.rows import Message
from veneer.errors import ConfigError, wrong_argument
from veneer.generate.in_slots import in_slots
from veneer.generate.sampling import Sampling
from veneer.kernels.transfer import sent
from veneer.models.context import own_context
from veneer.models.device import use_device
from veneer.models.end_tokens import end_tokens
from veneer.models.load import Base

# A question of the user's, or a conversation of Messages or of mappings as OpenAI has them.
Prompt = str | Sequence[Message | Mapping[str, object]]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Prompt,
    *,
    sampling: Sampling | None = None,
) -> str:
    """Return the model's answer to a question or a conversation.

    Raises ConfigError for a prompt that leaves no room for an answer in the model's context.
    """
    return "".join(stream(model, tokenizer, question, sampling=sampling))


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    batch: int = 32,
) -> list[str]:
    """Return the model's answers to many questions or conversations, `batch` of them at a time.

    Prompts of similar length share a batch, because padding is computed like any token.
    """
    texts = [""] * len(questions)
    for i, done in answers_as_ready(model, tokenizer, questions, sampling=sampling, batch=batch):
        texts[i] = done.text
    return texts


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and why it ended: the model ended it, or it may not be longer (OpenAI's words)."""

    text: str
    finish_reason: Literal["stop", "length"]


def answers_as_ready(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    batch: int = 32,
    window: int | None = None,
    early: Callable[[int, Answer], None] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yield the answers to many questions, each with the question's index, batch by batch.

    Prompts of similar length share a batch: those of `window` successive questions, or of all.
    `early` is called with an answer too that ends before its batch does, at once.
    """
    _check_types(model, tokenizer)
    if isinstance(questions, str):
        raise wrong_argument(questions, "A list of questions")
    sampling = sampling or Sampling()
    _seed(sampling)
    prompts = [_encode(tokenizer, question) for question in questions]
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    batch = batch if takes_padding(model, longest) else 1
    window = window or max(len(prompts), 1)
    ends = {*(end_tokens(model) or (tokenizer.eos_token_id,))}
    slots = in_slots(model, min(batch, len(prompts))) if prompts else None
    for first in range(0, len(prompts), window):
        order = sorted(
            range(first, min(first + window, len(prompts))), key=lambda i: len(prompts[i])
        )
        while order:
            indices = _first_batch(model, prompts, order[:batch], sampling)
            del order[: len(indices)]
            inputs = _padded(model, tokenizer, [prompts[i] for i in indices])
            options = _options(model, tokenizer, sampling, inputs)
            if early is not None and _one_beam(model):
                options["streamer"] = _RowStreamer(tokenizer, indices, ends, early)
            new: list[list[int]]
            if slots is not None:
                most = replace(sampling, max_new_tokens=options["max_new_tokens"])
                rows, streamer = [prompts[i] for i in indices], options.get("streamer")
                new = slots.answers(rows, most, ends=ends, streamer=streamer)
            else:
                tokens = model.generate(**inputs, **options)  # type: ignore[operator]
                new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
            decoded = tokenizer.batch_decode(
                new, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for i, text, ids in zip(indices, decoded, new, strict=True):
                yield i, Answer(text, "length" if ends.isdisjoint(ids) else "stop")


class _RowStreamer(BaseStreamer):
    """Passes on the answer of each row of a batch as soon as the model ends it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        ends: set[int],
        early: Callable[[int, Answer], None],
    ) -> None:
        self.tokenizer, self.ends, self.early = tokenizer, ends, early
        self.indices = indices
        self.going: dict[int, list[int]] | None = None  # the tokens so far, by row

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, and then a token of each row again and again."""
        if self.going is None:
            self.going = {row: [] for row in range(len(self.indices))}
            return
        for row, token in enumerate(value.tolist()):
            if row not in self.going:
                continue  # what comes behind an answer's end is padding
            self.going[row].append(token)
            if token in self.ends:
                text = self.tokenizer.decode(
                    self.going.pop(row),
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
                self.early(self.indices[row], Answer(str(text), "stop"))

    def end(self) -> None:
        """What has not ended by itself is as long as it may be, and comes with the batch."""


def _one_beam(model: PreTrainedModel) -> bool:
    """Return whether generation can be streamed, which transformers' beam search cannot."""
    config = getattr(model, "generation_config", None)
    return (getattr(config, "num_beams", None) or 1) == 1


def _first_batch(
    model: PreTrainedModel, prompts: Sequence[list[int]], order: list[int], sampling: Sampling
) -> list[int]:
    """Return the first of `order` that can share a batch, the shortest prompts first.

    A prompt near the end of the model's context has room for a short answer only, which a shorter
    prompt beside it would be cut to.
    """
    for n, i in enumerate(order):
        if len(prompts[i]) > len(prompts[order[0]]):
            longest = _longest_answer(model, len(prompts[i]), virtual_count(model))
            if longest is not None and longest < sampling.max_new_tokens:
                return order[:n]
    return order


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Prompt],
    *,
    virtual: int,
) -> None:
    """Raise ConfigError where a prompt behind `virtual` tokens leaves no room for an answer."""
    longest = max((len(_encode(tokenizer, question)) for question in questions), default=0)
    _longest_answer(model, longest, virtual)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Prompt,
    *,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """Yield the answer to a question or a conversation, piece by piece.

    Raises ConfigError as `answer` does, and whatever generation raises, after the pieces so far.
    """
    _check_types(model, tokenizer)
    sampling = sampling or Sampling()
    _seed(sampling)
    prompt = _encode(tokenizer, question)
    inputs = _padded(model, tokenizer, [prompt])
    streamer = TextIteratorStreamer(
        tokenizer,
        skip_prompt=True,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    options = _options(model, tokenizer, sampling, inputs)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            use_device(model.device)
            if (slots := in_slots(model, 1)) is not None:
                most = replace(sampling, max_new_tokens=options["max_new_tokens"])
                ends = {*(end_tokens(model) or (tokenizer.eos_token_id,))}
                slots.answers([prompt], most, ends=ends, streamer=streamer)
                streamer.end()
            else:
                model.generate(**inputs, **options, streamer=streamer)  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def _check_types(model: object, tokenizer: object) -> None:
    """Raise TypeError for a base instead of its model, and for no tokenizer in its place."""
    if isinstance(model, Base):
        raise wrong_argument(model, "A model, and then its tokenizer,")
    if not hasattr(tokenizer, "chat_template"):
        raise wrong_argument(tokenizer, "A tokenizer, between the model and the question,")


def _encode(tokenizer: PreTrainedTokenizerBase, question: Prompt) -> list[int]:
    """Return the tokens after which the model answers."""
    messages = [Message("user", question)] if isinstance(question, str) else _messages(question)
    text = prompt_text(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(turns: Sequence[Message | Mapping[str, object]]) -> list[Message]:
    """Return a conversation's turns. Raises ConfigError for a mapping that is no message."""
    messages = [turn for turn in turns if isinstance(turn, Message)]
    if len(messages) == len(turns):
        return messages
    try:
        return read_turns({"messages": list(turns)}, "messages").messages
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> dict[str, torch.Tensor]:
    """Return prompts as one batch, padded on the left, so that all answers start at one place."""
    longest = max(map(len, prompts))
    pad = _padding(tokenizer)["pad_token_id"]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return {"input_ids": sent(ids, model.device), "attention_mask": sent(mask, model.device)}


def _options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    inputs: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Return the arguments of `generate`, with answers that end with the model's context."""
    options = {**sampling.options(), **_padding(tokenizer)}
    longest = _longest_answer(model, inputs["input_ids"].shape[1], virtual_count(model))
    if longest is not None:
        options["max_new_tokens"] = min(sampling.max_new_tokens, longest)
    return options


def _longest_answer(model: PreTrainedModel, prompt: int, virtual: int) -> int | None:
    """Return how many tokens an answer may have, None where the model's context has no end.

    prompt, virtual: tokens before it. Raises ConfigError where none is left.
    """
    context = own_context(model.config)
    if context is None:
        return None
    longest = context - virtual - prompt
    if longest <= 0:
        beside = f" and {virtual:,} virtual ones before them" if virtual else ""
        raise ConfigError(
            f"The prompt has {prompt:,} tokens{beside}, which leaves no room for an answer in "
            f"the model's context of {context:,}."
        )
    return longest


def _padding(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if pad is not None:
            return {"pad_token_id": int(pad)}
    return {"pad_token_id": 0}


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
