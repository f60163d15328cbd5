"""vLLM's server as a teacher: a student is given what the same model gives here. It needs an
environment of its own: make proof-vllm."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import veneer
from support.closeness import assert_no_further
from support.random_adapters import examples, tokenizer
from support.tiny_models import VOCAB
from support.vllm import MARKS, served_by_vllm
from support.vllm_sides import tiny_base, written
from veneer.objectives.config import Objective
from veneer.training.served_teacher import ServedTeacher
from veneer.training.teacher import distillation_over

pytestmark = MARKS
ROWS = examples([9, 30, 7, 21])
COUNT = 8


def model_of(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(base, dtype=dtype)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return written(model_of(base), base.with_name("wide"), size=0.3)


@pytest.fixture(scope="module")
def address(base, adapter) -> Iterator[str]:
    merged = base.with_name("merged")
    veneer.write_model(veneer.merge(veneer.load(model_of(base), adapter)), tokenizer(), merged)
    with served_by_vllm(merged, base.with_suffix(".log")) as address:
        yield address


def given(base: Path, teacher: str, **settings: Any) -> np.ndarray:
    """Return what a teacher gives the rows' label tokens."""
    objective = Objective("distill", teacher=teacher, teacher_top_k=COUNT, **settings)
    if teacher.startswith("http"):
        ServedTeacher.of(objective, model_of(base).config).check(tokenizer())
    student = veneer.attach(model_of(base), veneer.LoRA(rank=2))
    (criterion,) = distillation_over(
        objective, {"train": ROWS}, student, identity={}, tokens_per_batch=40
    )
    return criterion.teacher.values


def dense(given: np.ndarray) -> torch.Tensor:
    """Return the probabilities of the likeliest tokens, each in its place, (labels, vocab)."""
    probabilities = np.zeros((len(given), VOCAB))
    likeliest = np.exp(given["log_p"][:, :-1], dtype=np.float64)
    np.put_along_axis(probabilities, given["tokens"].astype(np.int64), likeliest, 1)
    return torch.tensor(probabilities)


def test_a_student_is_given_what_the_same_model_gives_here(
    base, adapter, address, tmp_path, monkeypatch
):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    ours = dense(given(base, str(adapter)))
    theirs = dense(given(base, address))
    wide = veneer.load(model_of(base, torch.float64), adapter).double()
    expected = []
    for row in ROWS:
        with torch.no_grad():
            p = wide(torch.tensor([row.tokens])).logits[0].softmax(-1)
        expected += [p[n - 1] for n, label in enumerate(row.labels) if label >= 0]
    assert torch.equal(ours > 0, theirs > 0)
    assert_no_further(theirs, ours, torch.stack(expected) * (ours > 0), slack=1e-5)
