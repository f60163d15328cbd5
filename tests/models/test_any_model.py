"""Any transformers model: the same steps by Veneer's loop and by Trainer; saved, loaded, merged.

What is proven here is written down in docs/models.md; `python tests/models/test_any_model.py`
writes it anew.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import veneer
from support.random_adapters import examples, same, shake, snapshot
from support.tiny_models import CAUSAL, NO_DECODERS, tiny
from support.trainers import (
    ROWS,
    TOKENS,
    Inputs,
    batches,
    padded,
    sft_losses,
    trainer_losses,
    veneer_losses,
)
from veneer.adapter.wrapper import Wrapper
from veneer.data.packing import StepOrder
from veneer.fused.forward import choose_forward
from veneer.models.fingerprint import base_parameters

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the table: written by its tests -->\n", "<!-- the table ends -->\n"
LORA = veneer.LoRA(rank=4, targets="all")
CLOSE = 1e-4  # losses in float32, relatively: two ways of summing, each step built on the last
COLUMNS = (
    "architecture",
    "attach",
    "Veneer's loop",
    "Trainer",
    "SFTTrainer",
    "save, load",
    "merge",
    "notes",
)
NAMES = [*CAUSAL, *NO_DECODERS]


@dataclass(frozen=True)
class Proven:
    """What holds of an architecture, in the words of the table."""

    loop: str
    notes: tuple[str, ...]


def attached(architecture: str, config: veneer.LoRA = LORA) -> tuple[Any, list[str]]:
    """Return a freshly adapted model, and the warnings of attaching it."""
    model = tiny(architecture)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", veneer.VeneerWarning)
        veneer.attach(model, config, seed=0)
    if architecture in NO_DECODERS and hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    return model, [str(w.message) for w in caught if issubclass(w.category, veneer.VeneerWarning)]


def steps_of(architecture: str) -> list[Inputs]:
    """Return a few batches such as the architecture takes."""
    steps = batches()
    generator = torch.Generator().manual_seed(7)
    if architecture == "bert":
        for step in steps:
            step["labels"] = torch.randint(3, (len(step["input_ids"]),), generator=generator)
    if architecture == "vit":
        pictures = torch.randn(4, 3, 16, 16, generator=generator)
        steps = [{"pixel_values": pictures, "labels": torch.tensor([0, 1, 2, 1])} for _ in steps]
    return steps


@torch.no_grad()
def output_of(model: Any, architecture: str) -> Tensor:
    inputs = steps_of(architecture)[0]
    if architecture not in ("t5", "bert", "vit"):
        inputs = {"input_ids": padded(ROWS[:1])["input_ids"], "use_cache": False}  # type: ignore[dict-item]
    return model.eval()(**inputs).logits


def near(losses: list[float], expected: list[float]) -> bool:
    return len(losses) == len(expected) and all(
        abs(a - b) <= CLOSE * abs(b) for a, b in zip(losses, expected, strict=True)
    )


def base_of(model: Any) -> dict[str, Tensor]:
    """Return the base's weights but for those that train beside the adapter."""
    own = base_parameters(model)
    return {path: w.detach().clone() for path, w in own.items() if not path.startswith("classif")}


@cache
def proven(architecture: str) -> Proven:
    """Prove what the table says of an architecture, and return its words."""
    model, warned = attached(architecture)
    base = tiny(architecture)
    assert torch.equal(output_of(model, architecture), output_of(base, architecture))
    before = base_of(base)
    loop, notes = "", []
    if architecture in NO_DECODERS:
        losses = trainer_losses(model, steps_of(architecture))
        theirs = by_peft(architecture)
        assert near(losses, theirs), (losses, theirs)
    else:
        chosen, events = choose_forward(model, ROWS)
        ways = "one by one" if chosen.alone else "packed" if chosen.packed else "padded"
        loop = ways if chosen.head else f"{ways}, all logits"
        if chosen.layers:
            beside = all(layer.structure.mixture for layer in chosen.layers)
            notes.append("attention as one function" if beside else "layers as two functions")
        if not chosen.packed:
            notes.append(why_not_packed(events[0]))
        assert bool(events) == (loop != "packed")
        losses = veneer_losses(model)
        other, _ = attached(architecture)
        assert near(trainer_losses(other, steps_of(architecture)), losses)
    assert losses[-1] < losses[0], losses
    assert same(base_of(model), before)
    for text in warned:
        notes.append("left as they are: " + text.rpartition(": ")[2].rstrip("."))
    prove_files_and_merging(model, architecture)
    return Proven(loop, tuple(notes))


def why_not_packed(notice: str) -> str:
    """Return the reason of a run's notice without its numbers."""
    if "its loss of" in notice or "alone" in notice:
        return "packed, its rows would see each other"
    if "UnsupportedAttention: " in notice:
        return f"not packed for its attention ({notice.rpartition(': ')[2]})"
    return "packing fails on its own way of attending"


def by_peft(architecture: str) -> list[float]:
    """Return the losses of PEFT in Trainer, from the same start."""
    fresh, _ = attached(architecture)
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)
        veneer.save(fresh, Path(place) / "adapter", format="peft")
        theirs = PeftModel.from_pretrained(
            tiny(architecture), f"{place}/adapter", is_trainable=True
        )
    if hasattr(fresh, "classifier"):
        theirs.base_model.model.classifier.requires_grad_(True)
    return trainer_losses(theirs, steps_of(architecture))


def prove_files_and_merging(model: Any, architecture: str) -> None:
    """Prove that the model loads as it was saved, and merges into one that computes the same."""
    expected = output_of(shake(model), architecture)
    plain = veneer.merge(model)
    assert not any(isinstance(module, Wrapper) for module in plain.modules())
    torch.testing.assert_close(output_of(plain, architecture), expected, rtol=1e-4, atol=1e-4)
    veneer.use(model, None)
    assert torch.equal(
        output_of(veneer.detach(copy.deepcopy(model)), architecture), output_of(model, architecture)
    )
    veneer.use(model, "default")
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)
        plain.save_pretrained(f"{place}/merged")
        again = type(plain).from_pretrained(f"{place}/merged")
        assert same(snapshot(again), snapshot(plain))
        veneer.save(model, f"{place}/native")
        veneer.save(model, f"{place}/peft", format="peft")
        for form in ("native", "peft"):
            fresh = tiny(architecture)
            if hasattr(fresh, "classifier"):
                fresh.classifier.load_state_dict(model.classifier.state_dict())
            veneer.load(fresh, f"{place}/{form}")
            assert torch.equal(output_of(fresh, architecture), expected)


EVEN = examples([12] * 30, vocabulary=6, seed=4, learnt=1.0)  # five in a step


def in_order() -> list[list[int]]:
    """Return the tokens of EVEN as Veneer's loop goes through them."""
    steps = StepOrder([len(row.tokens) for row in EVEN], TOKENS, TOKENS, seed=0).epoch(0)
    rows = [i for step in steps for i in step[0]]
    assert {len(step[0]) for step in steps} == {5}
    return [EVEN[i].tokens for i in rows]


@cache
def proven_with_trl(architecture: str) -> bool:
    """Prove that SFTTrainer has the losses of Veneer's loop, and return whether it may pack."""
    expected = veneer_losses(attached(architecture)[0], EVEN)
    model, _ = attached(architecture)
    before = base_of(model)
    # In its own settings, but for those that make other numbers: bfloat16, and for experts a loss
    # that balances them.
    exact = {"bf16": False, "router_aux_loss_coef": 0.0}
    theirs = sft_losses(model, in_order(), per_device_train_batch_size=5, **exact)
    assert near(theirs, expected), (theirs, expected)
    assert same(base_of(model), before)
    model, _ = attached(architecture)
    try:
        packed = sft_losses(model, in_order(), packing=True, max_length=TOKENS, **exact)
    except ValueError as error:
        if "can't keep packed sequences apart" in str(error):
            return False
        raise
    assert same(base_of(model), before)
    return near(packed, expected)


def table() -> str:
    """Return the table of docs/models.md, each line of which is proven on the way."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name in sorted(CAUSAL) + list(NO_DECODERS):
        proof = proven(name)
        trl = "-"
        if name not in NO_DECODERS:
            trl = "yes, packed too" if proven_with_trl(name) else "yes, not packed"
        notes = "; ".join(proof.notes)
        cells = [f"`{name}`", "yes", proof.loop or "-", "yes", trl, "yes", "yes", notes]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def page_with(text: str) -> str:
    """Return docs/models.md with another table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


# One of each kind; the slow tests have them all.
SOME = ["mixtral", "gemma2", "mamba", "t5", "bert", "vit"]


@pytest.mark.parametrize("architecture", SOME)
def test_the_same_steps_everywhere(architecture):
    proven(architecture)


def test_the_same_steps_by_trl():
    assert proven_with_trl("mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in NAMES if name not in SOME])
def test_the_same_steps_with_all_others(architecture):
    proven(architecture)


@pytest.mark.slow
def test_the_page_says_what_is_proven():
    assert PAGE.read_text(encoding="utf-8") == page_with(table())


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
