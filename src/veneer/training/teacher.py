"""What a teacher, another adapter over the same base or a server's model, gives the rows of a run:
asked for once, before the first step, and kept beside the encoded rows."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from transformers import PreTrainedModel

from veneer.adapter.attach import detach
from veneer.adapter.method import Method
from veneer.adapter.use import acting, in_use, use
from veneer.data import cache
from veneer.data.columns import column_of, lengths_of
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError, joined
from veneer.files import nearest_existing, new_file
from veneer.formats import adapters
from veneer.formats.install import install
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate
from veneer.fused.forward import choose_forward
from veneer.models.evaluating import evaluating
from veneer.objectives.config import Objective
from veneer.objectives.criterion import Criterion, label_counts
from veneer.objectives.distillation import Distillation, Likeliest, TeacherRows
from veneer.processes.world import World
from veneer.training.beside_rows import place_of
from veneer.training.served_teacher import MOST_ROWS, MOST_TOKENS, ServedTeacher
from veneer.training.threads import worthwhile_threads

FILE = "teacher.npy"
NAME = "veneer_teacher"  # of the adapter, while it acts
DIGEST = "teacher_digest"  # of its tensors, in a run's identity
DECIDE = ("teacher_top_k", "distill_temperature", DIGEST)  # what it gives, beside run and rows


def read_teacher(teacher: str, model: PreTrainedModel) -> AdapterState:
    """Return an adapter that is to teach. model: its base, or the skeleton of it.

    Raises ConfigError for what cannot teach, AdapterError for what is no adapter of this base.
    """
    directory = Path(teacher).expanduser()
    if not directory.exists() or (directory / "config.json").is_file():
        what = "is a whole model" if directory.exists() else "is no directory"
        raise ConfigError(
            f"{teacher} {what}, and cannot teach given answers: their teacher is an adapter of the "
            "same base, or a server's model. Name its directory, or the server's address, by "
            "--teacher; with --on-policy another model can teach."
        )
    state = adapters.read(directory, model)
    config = state.config
    if isinstance(config, Method) and config.replaces_weights:
        raise ConfigError(
            f"{teacher} holds weights of the base that were trained ({config.method}), and cannot "
            "teach: a teacher is an adapter of low rank, a prefix or a prompt."
        )
    if state.new_tokens is not None:
        raise ConfigError(
            f"{teacher} has new tokens, which the student does not have, and cannot teach."
        )
    is_skeleton = model.device.type == "meta"  # whose weights cannot be compared
    if problems := validate(model, state, None, force=is_skeleton):
        raise AdapterError(f"The teacher {teacher} does not fit the base: {joined(problems)}.")
    return state


def digest_of(state: AdapterState) -> str:
    """Return a hash of an adapter's settings and tensors."""
    text = json.dumps(asdict(state.config), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    rows = {
        f"{path} {stored.ids}": stored.rows
        for path, stored in state.trained_tokens.items()
        if stored.rows is not None
    }
    for name, tensor in sorted({**state.tensors, **state.modules_to_save, **rows}.items()):
        digest.update(name.encode())
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity_of_teacher(
    objective: Objective, model: PreTrainedModel, world: World
) -> dict[str, str]:
    """Return what a run's identity has of its teacher beside its name, nothing without one. Raises
    what `read_teacher` or `ServedTeacher.of` does, and ConfigError for several processes."""
    if objective.teacher is None or objective.on_policy:  # which says its own
        return {}
    check_alone(world.size)
    if objective.teacher_is_served:
        return {DIGEST: ServedTeacher.of(objective, model.config).digest}
    return {DIGEST: digest_of(read_teacher(objective.teacher, model))}


def check_alone(processes: int) -> None:
    """Raise ConfigError for several processes."""
    if processes > 1:
        raise ConfigError("distill trains in one process; leave out --processes.")


def bytes_of_teacher(
    objective: Objective,
    splits: Mapping[str, Sequence[Example]],
    vocab: int,
    *,
    before: Mapping[str, Any],
) -> int:
    """Return the size of the files with what a teacher gives the rows of each split, but for those
    that a run has written already which goes on; before: its identity, nothing where none does."""
    labels = 0
    for split, rows in splits.items():
        place = place_of({"split": split, **before}, FILE, *DECIDE)
        if not (before and place.exists()):
            labels += int(column_of(rows, "label_counts").sum(dtype=np.int64))
    assert objective.teacher_top_k is not None
    return labels * (8 * min(objective.teacher_top_k, vocab) + 4)


def check_space_of_teacher(needed: int) -> None:
    """Raise ConfigError where the disk of the encoded rows does not hold these files."""
    free = shutil.disk_usage(nearest_existing(cache.home())).free
    if needed > free:
        raise ConfigError(
            f"What the teacher gives these rows needs up to {needed / 1e6:,.0f} MB in "
            f"{cache.home()}, but the disk has {free / 1e6:,.0f} MB. Take a lower --teacher-top-k, "
            "name another place by the environment variable VENEER_CACHE, or go ahead by "
            "--ignore-plan, as where an earlier run has computed the same."
        )


def distillation_over(
    objective: Objective,
    splits: Mapping[str, Sequence[Example]],
    model: PreTrainedModel,
    *,
    identity: Mapping[str, Any],
    tokens_per_batch: int,
) -> list[Criterion]:
    """Return distillation from a teacher over the examples of each split of a run's rows.

    identity: of the run. Which adapters act and what trains is as before, afterwards.
    """
    criteria: list[Criterion] = []
    assert objective.teacher is not None
    served = ServedTeacher.of(objective, model.config) if objective.teacher_is_served else None
    for split, examples in splits.items():
        place = None
        if "base" in identity:
            place = place_of({"split": split, **identity}, FILE, *DECIDE)
        ends = np.cumsum(column_of(examples, "label_counts"), dtype=np.int64)
        slots = int(ends[-1]) if len(ends) else 0
        values = _read(place, slots)
        if served is not None:
            values = _asked(served, examples, values, place, tokens_per_batch=tokens_per_batch)
        elif values is None:
            teacher = read_teacher(objective.teacher, model)
            with (
                attached(model, teacher),
                acting(model, NAME),
                torch.random.fork_rng([]),
                torch.no_grad(),
                evaluating(model),
                worthwhile_threads(model),
            ):
                records = _records(objective, model, examples, tokens_per_batch=tokens_per_batch)
                values = _written(records, place, slots)
        criteria.append(Distillation(objective, TeacherRows(values, ends)))
    return criteria


def _asked(
    served: ServedTeacher,
    examples: Sequence[Example],
    kept: NDArray[np.void] | None,
    place: Path | None,
    *,
    tokens_per_batch: int,
) -> NDArray[np.void]:
    """Return what a server's model gives the rows: what was kept, if it gives that still."""
    if kept is not None:
        if len(kept):
            served.check_unchanged(examples, kept)
        return kept
    served.check_lengths(examples)
    most = min(tokens_per_batch, MOST_TOKENS)
    batches = _in_order(lengths_of(examples), most, most_rows=MOST_ROWS)
    slots = int(column_of(examples, "label_counts").sum(dtype=np.int64))
    return _written(served.records(examples, batches), place, slots)


@contextmanager
def attached(model: PreTrainedModel, teacher: AdapterState) -> Iterator[None]:
    """Have the teacher on the base as NAME; what acts and trains stays as it is."""
    training = [weight for weight in model.parameters() if weight.requires_grad]
    before = in_use(model)

    def as_before() -> None:
        use(model, before)
        for weight in training:
            weight.requires_grad_(True)

    with torch.random.fork_rng([]):
        install(model, teacher, name=NAME, force=True)  # was validated
    as_before()
    try:
        yield
    finally:
        detach(model, NAME)
        as_before()


def _records(
    objective: Objective,
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int,
) -> Iterator[NDArray[np.void]]:
    """Yield what the model as it is gives the label tokens of all rows, in the order of the rows.
    A label at a row's first token, which nothing predicts, has a record of zeros."""
    assert objective.teacher_top_k is not None
    forward, _ = choose_forward(model, examples)
    with forward.installed(model):
        for indices in _in_order(lengths_of(examples), tokens_per_batch):
            batch = pack(examples, indices)
            noted = Likeliest(objective.teacher_top_k, objective.distill_temperature)
            forward.losses(model, batch, noted)
            tokens, log_p = torch.cat(noted.tokens), torch.cat(noted.log_p)
            k, first = tokens.shape[1], 0
            dtype = np.dtype([("tokens", "<i4", (k,)), ("log_p", "<f4", (k + 1,))])
            for index, count in zip(indices, label_counts(batch), strict=True):
                records = np.zeros(examples[index].label_tokens, dtype=dtype)
                own = slice(len(records) - count, None)
                records["tokens"][own] = tokens[first : first + count].numpy()
                records["log_p"][own] = log_p[first : first + count].numpy()
                first += count
                yield records


def _in_order(
    lengths: NDArray[np.integer], limit: int, *, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Yield the rows in their order, in batches of at most `limit` tokens and `most_rows`, or one
    row."""
    batch: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths.tolist()):
        if batch and (tokens + length > limit or len(batch) == most_rows):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


def _read(place: Path | None, slots: int) -> NDArray[np.void] | None:
    """Return what is kept, mapped, or None where nothing is, or nothing whole."""
    if not slots:
        return np.empty(0, dtype=[("tokens", "<i4", (1,)), ("log_p", "<f4", (2,))])
    if place is None:
        return None
    with suppress(OSError, ValueError, EOFError):
        values = np.load(place, mmap_mode="r", allow_pickle=False)
        if values.shape == (slots,) and values.dtype.names == ("tokens", "log_p"):
            cache.note_use(place.parent)
            return values
    return None


def _written(
    records: Iterator[NDArray[np.void]], place: Path | None, slots: int
) -> NDArray[np.void]:
    """Write records to a file as they come, and return them mapped. Without a place, the file goes
    when nothing uses it any more. Raises DataError where they cannot be written."""
    if place is None:
        with tempfile.TemporaryFile() as file:
            dtype, start = _write(records, file, slots)
            return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=(slots,))
    with cache.writing_to(place.parent):
        cache.prune(place.parent.parent)
        with new_file(place) as temporary, temporary.open("wb") as file:
            _write(records, file, slots)
    cache.note_use(place.parent)
    values = _read(place, slots)
    assert values is not None
    return values


def _write(
    records: Iterator[NDArray[np.void]], file: IO[bytes], slots: int
) -> tuple[np.dtype[np.void], int]:
    """Write records as an .npy file; return their dtype, and where they begin."""
    start = 0
    for each in records:
        if not start:
            header = {
                "descr": npy.dtype_to_descr(each.dtype),
                "fortran_order": False,
                "shape": (slots,),
            }
            npy.write_array_header_1_0(file, header)
            start, dtype = file.tell(), each.dtype
        file.write(each.tobytes())
    file.flush()
    return dtype, start
