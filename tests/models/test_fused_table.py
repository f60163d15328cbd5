"""Every causal language model of transformers is adapted, trained, saved, loaded and merged, and
docs/models.md says how its layers, its rows and its head are computed.

`PYTHONPATH=tests python tests/models/test_fused_table.py` writes the table anew.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import veneer
from support.every_architecture import MODEL_TYPES, NO_MODEL, OFTEN, small
from support.random_adapters import distance, examples, ids, shake
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.models.blocks import decoder_layers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN = "<!-- every causal language model: written by its tests, with transformers "
END = "<!-- every causal language model ends -->\n"
HEAD = "| model type | layers fused | rows | head | why not |\n|---|---|---|---|---|\n"
LORA = veneer.LoRA(rank=2, targets="all")
ROWS = examples([7, 19, 12, 5])
# What once failed in one of the steps: a stack of experts beside a layer of the same name, routers
# and grouped layers that look linear, layers that differ in their heads, parts of several
# attentions. The largest of those that once failed are slow.
ONCE_BROKEN = {
    *("qwen2_moe", "llama4_text", "deepseek_v4", "longcat_flash", "modernbert-decoder"),
    "got_ocr2",
}
# One of each structure that people tune; tests/laws/test_fused_gradients.py has all their models.
USUAL = {"llama", "gemma3_text", "phi3", "gpt2", "falcon"}


@dataclass(frozen=True)
class Way:
    """How the loss of a model is computed, and why not faster, in a person's words."""

    fused: int
    layers: int | None
    rows: str
    head: str
    why_not: tuple[str, ...]

    def __str__(self) -> str:
        fused = f"{self.fused} of {self.layers}" if self.layers else "none"
        return f"{fused} | {self.rows} | {self.head} | {'; '.join(self.why_not)}"


def way_of(model: Any, forward: Forward, notices: list[str]) -> Way:
    layers = decoder_layers(model)
    rows = head = None
    for notice in notices:
        why = in_words(notice.partition(": ")[2])
        if notice.startswith("Logits"):
            head = why
        elif notice.startswith("Rows"):
            rows = why if forward.alone else f"packed, {why}"
    unfused = dict.fromkeys(map(in_words, forward.unfused.values()))
    if layers is None:
        unfused = {"no decoder layers are known": None}
    reasons = [f"layers: {why}" for why in unfused if rows != f"packed, {why}"]
    if mixtures := sum(layer.structure.mixture is not None for layer in forward.layers):
        reasons.append(f"attention alone of {mixtures}, beside a mixture of experts")
    reasons += [f"rows: {rows}"] * bool(rows) + [f"head: {head}"] * bool(head)
    return Way(
        len(forward.layers),
        None if layers is None else len(layers),
        "packed" if forward.packed else "one by one" if forward.alone else "padded",
        "labelled rows" if forward.head else "all rows",
        tuple(reasons),
    )


def in_words(reason: str) -> str:
    """Return a reason without the numbers, the exceptions and the long lists of one small model."""
    reason = re.sub(r"its loss of \S+ differs from the model's own [\d.]+", "another loss", reason)
    reason = re.sub(r"a token is \S+ from what it is in its row alone", "other states", reason)
    reason = re.sub(r"UnsupportedAttention: (\w+)$", r"attention with \1", reason)
    reason = re.sub(r"\b(?!Unsupported)\w+Error: .*?(?=; padded|$)", "an error", reason)
    reason = re.sub(r"((?:[\w.]+, ){3}[\w.]+)(?:, [\w.]+)+", r"\1 and more", reason)
    return reason.removeprefix("UnsupportedAttention: ").rstrip(".").replace("|", "/")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    torch.manual_seed(0)  # of Reformer's hashes
    return model.eval()(input_ids=ids(), use_cache=False).logits


@cache
def proven(model_type: str) -> Way:
    """Prove that an architecture is adapted, trained, saved, loaded and merged, and return how its
    loss is computed."""
    base = small(model_type)
    fresh, model = copy.deepcopy(base), copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)  # of experts
        veneer.attach(model, LORA, seed=0)
    assert torch.equal(logits(model), logits(base))
    forward, notices = choose_forward(model, ROWS)
    way = way_of(model, forward, notices)
    shake(model).train()
    loss = forward(model, pack(ROWS, range(len(ROWS))))
    loss.backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert loss.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(w.requires_grad for w in model.parameters() if w.grad is not None)
    expected = logits(model)
    with TemporaryDirectory() as place:
        veneer.save(model, f"{place}/adapter")
        veneer.load(fresh, f"{place}/adapter")
    assert torch.equal(logits(fresh), expected)
    assert distance(logits(veneer.merge(model)), expected) < 1e-3
    assert distance(logits(base), expected) > 1e-2
    return way


def line_of(model_type: str) -> str:
    return f"| `{model_type}` | {proven(model_type)} |".replace("|  |", "| |") + "\n"


def page_with(lines: list[str]) -> str:
    """Return docs/models.md with another table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    version = f"{transformers.__version__} -->\n"
    return before + BEGIN + version + HEAD + "".join(lines) + END + rest.partition(END)[2]


def table() -> tuple[str, list[str]]:
    """Return the version of transformers that the page's table is of, and its lines."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    version, *lines = text.splitlines(keepends=True)
    return version.partition(" ")[0], lines[2:]


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in USUAL | ONCE_BROKEN else pytest.mark.slow)
        for name in MODEL_TYPES
        if name not in NO_MODEL
    ],
)
def test_the_page_says_what_is_proven(model_type):
    line = line_of(model_type)
    if model_type in OFTEN:
        assert "2 of 2 | packed | labelled rows | |" in line
    version, lines = table()
    if version == transformers.__version__:
        assert line in lines


def test_the_page_has_every_architecture_in_order():
    version, lines = table()
    if version == transformers.__version__:
        named = [line.split("`")[1] for line in lines]
        assert named == [name for name in MODEL_TYPES if name not in NO_MODEL]


if __name__ == "__main__":
    built = [name for name in MODEL_TYPES if name not in NO_MODEL]
    PAGE.write_text(page_with([line_of(name) for name in built]), encoding="utf-8")
