"""The tools of one request: what its answer may call and must, over the model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from veneer.errors import RequestError
from veneer.serve.api.calls import CallForm, CallReader, call_form
from veneer.serve.api.protocol import ChatRequest
from veneer.serve.api.tools import Tool, grammar_of_calls
from veneer.serve.engine.request import Grammar


@dataclass(frozen=True)
class Tools:
    """Tools that an answer may call, and how the model writes calls.

    grammar: what the answer must be, None where it need not call any. special: whether calls are
    written with special tokens, which must then show in the text.
    """

    all: Sequence[Tool] = ()
    form: CallForm | None = None
    grammar: Grammar | None = None
    special: bool = False

    @classmethod
    def of(cls, asked: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> Tools:
        """Return the tools of a request. Raises RequestError for what cannot be followed."""
        must = asked.called_tools()
        if not asked.callable_tools:
            return cls()
        if asked.grammar is not None:
            raise RequestError(
                f"{asked.grammar.asked_by} and tools cannot be followed together: an answer is "
                'either a call or of that form. Give tool_choice "none" for the form.',
                param=asked.grammar.asked_by,
            )
        form = _form(tokenizer)
        several = asked.parallel_tool_calls is not False
        grammar = grammar_of_calls(form, must, tokenizer, several=several) if must else None
        special = any(token in form.marks for token in tokenizer.all_special_tokens)
        return cls(asked.callable_tools, form, grammar, special)

    def reader(self) -> CallReader:
        """Return what reads the calls of an answer."""
        assert self.form is not None
        return CallReader(self.form, {tool.function.name for tool in self.all})


@lru_cache(maxsize=4)
def _form(tokenizer: PreTrainedTokenizerBase) -> CallForm:
    return call_form(tokenizer)
