"""Conversations as the text that the model reads, and where the answers are in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from veneer.data.rows import Conversation, Message
from veneer.data.spans import Span
from veneer.data.template_limits import check_template, limited
from veneer.errors import DataError, VeneerError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer that has no chat template: turns joined by newlines, answers closed by the end
# token. Roles show in nothing else, as a model without a template knows no names for them.
NO_SYSTEM = "the model's chat template has no place for one"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the text after which the model writes its answer to `messages`.

    It holds its special tokens already: tokenise it with `add_special_tokens=False`.
    Raises DataError where the template refuses the messages.
    """
    return Chat(tokenizer).render(messages, prompt=True)


def check_system_prompt(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Raise DataError where the model's chat template would not write a system prompt."""
    try:
        text = prompt_text(tokenizer, [Message("system", system), Message("user", "a")])
    except DataError:
        text = ""
    if system.strip() not in text:
        raise DataError(
            f"No system prompt can be used: {NO_SYSTEM}. Put it into the question, and give "
            "--system ''."
        )


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer itself puts before any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    start = encoded["special_tokens_mask"].index(0)
    return list(encoded["input_ids"][:start])


class Chat:
    """A tokenizer's way to write conversations: its chat template, or else `PLAIN_TEMPLATE`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.plain = tokenizer.chat_template is None
        self._templates = _templates_of(tokenizer)
        start = start_tokens(tokenizer) if self.plain else []
        self._start = "".join(tokenizer.convert_ids_to_tokens(start))
        self._eos = tokenizer.eos_token or ""
        added = tokenizer.added_tokens_decoder.values()
        special = {self._eos, *(token.content for token in added if token.special)} - {""}
        self._special = tuple(special)
        either = "|".join(map(re.escape, special)) or "(?!)"
        self._ending = re.compile(rf"\s*(?:{either})")
        self._endings = re.compile(rf"\s*(?:{either})+")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        prompt: bool = False,
    ) -> str:
        """Return the messages as text, with the opening of an answer behind them if `prompt`.

        Raises DataError where the template refuses the messages, fails, or does not end.
        """
        for template in self._templates:
            check_template(template)
        try:
            with limited():
                text = self._tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content, **m.fields} for m in messages],  # type: ignore[arg-type]
                    tools=list(tools) or None,  # type: ignore[arg-type]
                    chat_template=PLAIN_TEMPLATE if self.plain else None,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses the messages: {error}") from error
        except VeneerError:
            raise
        except Exception as error:  # of whatever kind: a template computes with what it is given
            what = shortened(f"{type(error).__name__}: {error}")
            raise DataError(f"the model's chat template fails on the messages: {what}") from error
        assert isinstance(text, str)
        return self._start + text

    def conversation(self, row: Conversation) -> tuple[str, list[Span]]:
        """Return a conversation as text, and the spans of it that are to be learnt.

        A span is what the model has to write after the prompt: an answer and the token that ends
        its turn, without the white space that the template puts behind it. Where the template
        ends an answer with no special token, the end token is put in. Turns behind the last
        answer teach nothing and are left out.
        Raises DataError where the template refuses the messages, rewrites an answer, or writes no
        tools though the row has some.
        """
        answers = [i for i, m in enumerate(row.messages) if m.role == "assistant" and m.learn]
        row = replace(row, messages=row.messages[: answers[-1] + 1])
        text = self._render(row)
        first = row.messages[0]
        if first.role == "system" and first.content.strip() not in text:
            raise DataError(
                f"its system prompt would be lost, as {NO_SYSTEM}; put it into the question"
            )
        if row.tools and text == self.render(row.messages):
            raise DataError("the model's chat template writes no tools, so 'tools' would be lost")
        for i, message in enumerate(row.messages):
            if missing := [name for name in message.calls if name not in text]:
                raise DataError(
                    f"the model's chat template does not write the call of {missing[0]!r} in "
                    f"message {i + 1}"
                )
        return self._closed(text, [self._span(row, i, text) for i in answers])

    def _render(self, row: Conversation, until: int | None = None, *, prompt: bool = False) -> str:
        return self.render(row.messages[:until], row.tools, prompt=prompt)

    def _span(self, row: Conversation, i: int, text: str) -> Span:
        """Return where the answer `messages[i]` is in `text`, the rendering of the row.

        As a rule `text` begins with the rendering up to this answer, and that begins with the
        prompt for it: what lies between the two ends is the answer.
        """
        prompt = self._render(row, i, prompt=True) if i > 0 else ""
        if prompt:
            until = text if i + 1 == len(row.messages) else self._render(row, i + 1)
            has_answer = _holds(until[len(prompt) :], row.messages[i])
            if has_answer and text.startswith(until) and until.startswith(prompt):
                return len(prompt), self._turn_end(until, len(prompt))
        return self._marked_span(row, i, text, prompt)

    def _marked_span(self, row: Conversation, i: int, text: str, prompt: str) -> Span:
        """Return the same for a template that writes a turn otherwise once others follow it.

        (Reasoning models drop the thoughts of earlier turns, or open one in the prompt that no
        later rendering shows.) Put a mark in the answer's place: all around it stays as it was.
        """
        mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in text)
        answer_turn = row.messages[i]
        instead = replace(answer_turn, content=mark, fields={})
        marked = replace(row, messages=(*row.messages[:i], instead, *row.messages[i + 1 :]))
        before, marks, after = self._render(marked).partition(mark)
        behind = len(text) - len(after)
        answer = text[len(before) : behind].rstrip()
        around = marks and text.startswith(before) and text.endswith(after)
        same = (
            _holds(answer, answer_turn)
            if answer_turn.calls
            else answer.strip() == answer_turn.content.strip()
        )
        if not around or not same:
            raise DataError(
                f"the model's chat template drops or rewrites the answer in message {i + 1}, so "
                "what is to be learnt cannot be told from the rest; give each row one answer, "
                "without its reasoning"
            )
        start = len(prompt) if prompt and before.startswith(prompt) else len(before)
        end = len(before) + len(answer)
        # Special tokens behind the answer belong to it where they come without the next turn too.
        alone = self._render(marked, i + 1).partition(mark)[2]
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(after, alone, strict=False))
        )
        limit = behind + shared
        ending = self._endings.match(text, end, limit) or self._ending.match(text, end)
        return start, ending.end() if ending else end

    def _turn_end(self, text: str, start: int) -> int:
        """Return where the turn that begins at `start` and ends `text` is over for the model.

        That is behind its last special token, or the one before where white space parts the two:
        some templates close the whole conversation with another.
        """
        end = at = len(text.rstrip())
        while token := next((t for t in self._special if text.endswith(t, start, at)), None):
            closed, at = at - len(token), len(text[: at - len(token)].rstrip())
            if at < closed and text.endswith(self._special, start, at):
                end = at
        return end

    def _closed(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Put the end token behind every span that ends with no special token."""
        pieces: list[str] = []
        closed: list[Span] = []
        taken = added = 0
        for start, end in spans:
            more = "" if text.endswith(self._special, start, end) else self._eos
            pieces += [text[taken:end], more]
            closed.append((start + added, end + added + len(more)))
            taken, added = end, added + len(more)
        return "".join([*pieces, text[taken:]]), closed


def _templates_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokenizer's chat templates, of which it may have several by name."""
    template = tokenizer.chat_template
    every = template.values() if isinstance(template, Mapping) else (template,)
    return tuple(text for text in every if isinstance(text, str))


def _holds(text: str, answer: Message) -> bool:
    """Return whether `text` has the answer's last line and its calls.

    Only the last line, as a template may lay out anew the reasoning before it.
    """
    last_line = answer.content.strip().splitlines()[-1:]
    return all(piece in text for piece in (*last_line, *answer.calls))
