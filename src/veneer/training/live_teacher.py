"""A teacher that is there while its student learns from samples: another adapter over the same
base, the base alone, or another model with the same vocabulary, in memory beside the student's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.adapter.use import acting
from veneer.data.encode import Example
from veneer.data.packing import Batch
from veneer.errors import ConfigError, ModelError
from veneer.formats import adapters
from veneer.formats.state import AdapterState
from veneer.formats.training import computed_in
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.head import NotedStates
from veneer.models.evaluating import evaluating
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base, load_config_and_tokenizer, skeleton_of
from veneer.models.locate import locate
from veneer.objectives.taught_samples import TeacherLogits
from veneer.training.planned import plan_run
from veneer.training.recipe import Recipe
from veneer.training.teacher import NAME, attached, digest_of, read_teacher

BASE = "base"  # the student's own, without any adapter


@dataclass(frozen=True, eq=False)
class LiveTeacher:
    """A model that gives its logits for whatever its student says.

    acts: the context in which it is the teacher. digest: a hash of it. forward: how its passes are
    computed, None where as the student's. notices: what a person should know of that.
    """

    model: PreTrainedModel
    acts: Callable[[], AbstractContextManager[None]]
    digest: str
    forward: Forward | None = None
    notices: Sequence[str] = ()

    @torch.no_grad()
    def on(self, students: Forward, batch: Batch) -> TeacherLogits:
        """Return what the teacher gives the label tokens of a batch. students: how the student's
        passes are computed."""
        forward = self.forward or students
        if self.forward is not None:
            # A student may draw tokens that fill up its vocabulary, and that a narrower one lacks.
            last = self.model.config.get_text_config().vocab_size - 1
            batch = replace(batch, tokens=np.minimum(batch.tokens, last))
        noted = NotedStates(self.model, forward.head)
        with self.acts(), evaluating(self.model):
            forward.losses(self.model, batch, noted)

        @torch.no_grad()
        def logits(first: int, count: int) -> torch.Tensor:
            with self.acts():  # for the head may be adapted
                return noted.logits(first, count)

        return logits


def check_teacher(
    teacher: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ConfigError, AdapterError or ModelError for what cannot teach, while nothing is loaded.

    config, tokenizer: the student's.
    """
    if teacher == BASE:
        return
    if is_adapter(teacher):
        read_low_rank(teacher, skeleton_of(config))
        return
    try:
        _, theirs = load_config_and_tokenizer(teacher)
    except ModelError as error:
        raise ConfigError(
            f"{teacher} cannot teach: it is no adapter's directory, and no model: {error}"
        ) from error
    check_vocabulary(teacher, theirs, tokenizer)


def check_vocabulary(
    teacher: str, theirs: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> None:
    """Raise ConfigError where a token of the student's is none, or another number, of a teacher's.
    What a teacher has beyond them nobody says."""
    numbers = theirs.get_vocab()
    if others := sorted(name for name, n in own.get_vocab().items() if numbers.get(name) != n):
        raise ConfigError(
            f"{teacher} cannot teach: of the student's tokens {len(others):,} are none of its own, "
            f"or others, such as {others[0]!r}. Take a model of the same family."
        )


def is_adapter(teacher: str) -> bool:
    """Return whether a teacher is an adapter over the student's base, and no model of its own."""
    place = Path(teacher).expanduser()
    if not place.exists() or (place / "config.json").is_file():
        return False
    if adapters.holds_adapter(place):
        return True
    try:
        locate(place)
    except ModelError:
        return True  # neither, and what reads adapters says what is there
    return False


def read_low_rank(teacher: str, model: PreTrainedModel) -> AdapterState:
    """Return an adapter that is to teach samples. Raises as `read_teacher`, and ConfigError for one
    that acts on other tokens than all of a row."""
    state = read_teacher(teacher, model)
    if not isinstance(state.config, LoRA) or state.config.invocation is not None:
        raise ConfigError(
            f"{teacher} cannot teach samples: it has virtual tokens, or acts from an invocation "
            "on. Take an adapter of low rank that acts on all tokens, or leave out on_policy."
        )
    return state


@contextmanager
def teaching(
    teacher: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> Iterator[LiveTeacher]:
    """Have a teacher beside a student, which acts and trains as before. examples: some rows, on
    which a model of its own is tried. Raises as `check_teacher`."""
    if teacher == BASE:
        yield LiveTeacher(student, partial(acting, student, None), BASE)
    elif is_adapter(teacher):
        state = read_low_rank(teacher, student)
        with attached(student, state):
            yield LiveTeacher(student, partial(acting, student, NAME), digest_of(state))
    else:
        # Its first weight is an adapter's where the base is quantized, embedding and all.
        dtype = computed_in(student).dtype
        with torch.random.fork_rng([]):
            base = load_base(teacher, device=student.device, dtype=dtype)
            check_vocabulary(teacher, base.tokenizer, tokenizer)
            base.model.requires_grad_(False)
            forward, notices = choose_forward(base.model, examples, answer_one_prompt=True)
        marks = json.dumps(fingerprint(base.model, base.tokenizer), sort_keys=True)
        digest = hashlib.sha256(marks.encode()).hexdigest()[:16]
        notices = [f"Of the teacher: {text}" for text in (*base.notices, *notices)]
        with forward.installed(base.model):
            yield LiveTeacher(base.model, nullcontext, digest, forward, notices)


def bytes_of_live_teacher(recipe: Recipe, dtype: torch.dtype, config: PretrainedConfig) -> int:
    """Return the memory that a recipe's teacher takes beside its student, in bytes: 0 without."""
    teacher = recipe.objective.teacher
    if teacher is None or teacher == BASE or not recipe.objective.on_policy:
        return 0
    if is_adapter(teacher):
        state = read_low_rank(teacher, skeleton_of(config))
        rows = [stored.rows for stored in state.trained_tokens.values() if stored.rows is not None]
        others = [*state.modules_to_save.values(), *rows]
        own = sum(4 * tensor.numel() for tensor in state.tensors.values())  # float32
        return own + sum(tensor.nbytes for tensor in others)
    alone = Recipe(teacher, recipe.data, lora=LoRA(targets="all"))  # as all have some layers
    return plan_run(alone, dtype).memory.weights.value
