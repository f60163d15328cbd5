"""A byte-level BPE tokenizer as the metadata of a GGUF file, where llama.cpp splits text alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from veneer.data.chat import start_tokens

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    by = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Split", **by}


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


# By llama.cpp's name (llama-vocab.cpp), how such a tokenizer splits text, as tokenizer.json says
# it; and whether a piece that is a token as a whole is taken without merging.
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_bytes(use_regex=True)], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)], False),
    "qwen2": ([_split(rf"{_WORDS}|\p{{N}}{_REST}"), _bytes(use_regex=False)], False),
    "llama-bpe": ([_split(rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"), _bytes(use_regex=False)], True),
}


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return llama.cpp's name for how a tokenizer splits text, or None for one that has none."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = described["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    splitting = (steps, bool(described["model"].get("ignore_merges")))
    return next((name for name, known in PRE_TOKENIZERS.items() if known == splitting), None)


def vocabulary_problems(tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[str]:
    """Yield why llama.cpp would not give a text the tokenizer's ids; `rows` of the embedding."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        yield "its tokenizer is not of the package tokenizers"
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model: Mapping[str, Any] = described["model"]
    odd = [k for k in ("byte_fallback", "dropout", "end_of_word_suffix") if model.get(k)]
    if model["type"] != "BPE" or odd or model.get("continuing_subword_prefix"):
        yield f"its tokenizer is {model['type']}, and not BPE over bytes alone"
    elif pre_tokenizer_of(tokenizer) is None:
        yield f"its tokenizer splits text in none of the known ways ({', '.join(PRE_TOKENIZERS)})"
    if (described["normalizer"] or {}).get("type") not in (None, "NFC"):
        yield f"its tokenizer changes text first ({described['normalizer']['type']})"
    # llama.cpp puts BOS before a text, and nothing else.
    if start_tokens(tokenizer) not in ([], [tokenizer.bos_token_id]):
        yield "its tokenizer puts other tokens than BOS before a text"
    stripping = [t["content"] for t in described["added_tokens"] if t["lstrip"] or t["rstrip"]]
    if stripping:
        yield f"its tokens {', '.join(map(repr, stripping))} take in the spaces around them"
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        yield f"its tokenizer has the token {largest}, and its embedding ends before that"


def vocabulary_notes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield where llama.cpp gives other ids, of a tokenizer without problems."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["normalizer"]:
        yield "llama.cpp does not compose characters (NFC) before it splits a text."
    if words := [token["content"] for token in described["added_tokens"] if token["single_word"]]:
        some = ", ".join(map(repr, words[:5])) + (" ..." if words[5:] else "")
        yield f"llama.cpp finds {some} inside longer words too."


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]
) -> None:
    """Write a tokenizer without problems: tokens, merges, special ids, chat template.

    rows: of the embedding, which llama.cpp wants a token for each of. ends: the tokens that end an
    answer.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token["special"] for token in described["added_tokens"]}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    types = [TokenType.NORMAL if i in texts else TokenType.UNUSED for i in range(rows)]
    for i, special in added.items():
        types[i] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    merges = described["model"]["merges"]
    name = pre_tokenizer_of(tokenizer)
    assert name is not None
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(bool(start_tokens(tokenizer)))
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    others = [end for end in ends if end != eos]
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (next(iter(others), None), writer.add_eot_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
