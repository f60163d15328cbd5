"""What an example looks like to the model, for a person to check."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from veneer.data.encode import UNLABELLED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what decoding gives for a character of which bytes are missing


def preview(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the example's text in pieces, each with whether it is learnt; of a pair, one row
    behind the other, with their lengths between them.

    A character whose tokens fall into two pieces is in the second; one of which truncation cut
    off a part is left out.
    """
    tokens, labels, second = example.tokens, example.labels, example.second
    if second:
        lengths = f"{second} tokens; beside it, with {len(tokens) - second}:"
        first = _pieces(tokens[:second], labels[:second], tokenizer)
        return [
            *first,
            (f"\n({lengths})\n", False),
            *_pieces(tokens[second:], labels[second:], tokenizer),
        ]
    return _pieces(tokens, labels, tokenizer)


def _pieces(
    tokens: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    shown, end = "", 0
    for learnt, run in groupby(label != UNLABELLED for label in labels):
        end += len(list(run))
        # Decoded from the start each time: a piece alone would lose the space before its first
        # word, and the bytes of a character that began in the piece before.
        text = tokenizer.decode(
            tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        text = text.rstrip(_UNFINISHED)
        if len(text) > len(shown):
            pieces.append((text[len(shown) :], learnt))
            shown = text
    return pieces
