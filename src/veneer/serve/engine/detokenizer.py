"""From tokens to text as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"  # what a tokenizer shows for bytes that are no whole character yet


class Detokenizer:
    """The text of an answer, which grows by tokens and ends before the first stop text. special:
    whether special tokens show in it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, special: bool = False
    ) -> None:
        self.special = special
        self.stop = tuple(stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # What a token adds may depend on those before it (spaces between words), so it is decoded
        # together with some whose text is out: ids from `_from` to `_shown`, as the text `_before`.
        self._from = self._shown = 0
        self._before = ""
        self._held = ""  # the end of the text, which may be the start of a stop text

    def add(self, token: int) -> tuple[str, str]:
        """Return the text that the token itself adds, and the text that is sure by now."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(UNFINISHED) or len(text) <= len(self._before):
            return "", ""
        new = text[len(self._before) :]
        self._from, self._shown = self._shown, len(self._ids)
        self._before = self._decode()
        return new, self._released(new)

    def end(self) -> str:
        """Return what is left of the text, as no more tokens come."""
        if self.stopped:
            return ""
        released = self._released(self._decode()[len(self._before) :])
        held, self._held = self._held, ""
        return released + held

    def _released(self, new: str) -> str:
        """Return what of the held text and the new text cannot belong to a stop text."""
        text = self._held + new
        stops = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if stops:
            self.stopped, self._held = True, ""
            return text[: min(stops)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self) -> str:
        ids = self._ids[self._from :]
        text = self._tokenizer.decode(
            ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` are the first of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
