"""Laws of distillation: a teacher equal to the student teaches nothing; its rows are asked once and
leave model and run as they were; a run goes on to the bit and shares passes with others."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from support.random_adapters import examples, same, shake, trained_weights
from support.runs import of
from support.tiny_models import VOCAB, quantized, tiny
from veneer.adapter.use import in_use
from veneer.data import cache
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError, VeneerError
from veneer.fused.forward import choose_forward
from veneer.models.load import skeleton_of
from veneer.objectives.config import Objective
from veneer.objectives.distillation import DistanceFromTeacher, Likeliest
from veneer.training import checkpoint
from veneer.training import teacher as teachers
from veneer.training.begin import let_train
from veneer.training.events import Evaluated, Step, Stopped

# The first row is learnt as a whole, the label of its first token too, which nothing predicts.
ROWS = [
    replace(row, labels=row.tokens if number == 0 else [-100, -100, *row.tokens[2:]])
    for number, row in enumerate(examples([9, 12, 7, 10]))
]
SEVERAL = veneer.TrainConfig(lr=0.01, tokens_per_step=25, steps=3, warmup=0, clip=0, save_every=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("teacher") / "adapter"
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=4, targets="all")), size=0.2)
    veneer.save(model, place)
    return str(place)


def student(base: Any = None) -> Any:
    return veneer.attach(tiny("llama") if base is None else base, veneer.LoRA(rank=2))


def run(model: Any, objective: Objective, course: Any = SEVERAL, **more: Any) -> list[Any]:
    return list(veneer.train(model, ROWS, course, objective=objective, **more))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_teacher_equal_to_the_student_teaches_nothing(teacher, divergence):
    model = veneer.load(tiny("llama"), teacher)
    let_train(model, "default")
    before = {name: weight.clone() for name, weight in trained_weights(model).items()}
    objective = Objective("distill", teacher=teacher, divergence=divergence, teacher_top_k=5)
    course = replace(SEVERAL, steps=1, tokens_per_step=1000)
    (step,) = of(Step, run(model, objective, course))
    # Another teacher gives 0.1 and more; what is kept of this one is rounded to float32.
    assert abs(step.loss) <= 1e-6
    assert before.keys() == trained_weights(model).keys()
    other = veneer.load(tiny("llama"), teacher)
    let_train(other, "default")
    shake(other, seed=5, size=0.2)
    (far,) = of(Step, run(other, objective, course))
    assert far.loss >= 1e-3


def expected_loss(model: Any, teacher: str) -> float:
    """Return the mean divergence over all tokens of the vocabulary, row by row."""
    other = veneer.load(tiny("llama"), teacher)
    total, count = 0.0, 0
    for row in ROWS:
        tokens = torch.tensor([row.tokens])
        with torch.no_grad():
            log_q, log_p = (
                each(input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                for each in (model, other)
            )
        learnt = torch.tensor(row.labels)[1:] != -100
        total += float((log_p.exp() * (log_p - log_q)).sum(-1)[learnt].sum())
        count += int(learnt.sum())
    return total / count


def test_with_the_whole_vocabulary_it_is_the_divergence_itself(teacher):
    """In a packed batch; and what acts and trains is as before."""
    model = shake(student(), size=0.2)
    names, trains = in_use(model), [*trained_weights(model)]
    modules = [type(module) for module in model.modules()]
    objective = Objective("distill", teacher=teacher, teacher_top_k=VOCAB + 7)
    expected = expected_loss(model, teacher)
    (step,) = of(Step, run(model, objective, replace(SEVERAL, steps=1, tokens_per_step=1000)))
    assert step.loss == pytest.approx(expected, rel=1e-4)
    assert step.label_tokens == sum(sum(label >= 0 for label in row.labels[1:]) for row in ROWS)
    assert in_use(model) == names
    assert [*trained_weights(model)] == trains
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_teach_rows(method, tmp_path):
    other = veneer.attach(tiny("llama"), veneer.Method(method, virtual_tokens=2))
    veneer.save(shake(other, size=0.2), tmp_path / "teacher")
    skeleton = skeleton_of(other.config)
    assert teachers.read_teacher(str(tmp_path / "teacher"), skeleton).config.method == method
    objective = Objective("distill", teacher=str(tmp_path / "teacher"))
    course = replace(SEVERAL, steps=1, tokens_per_step=1000)
    (step,) = of(Step, run(student(), objective, course))
    assert step.loss >= 1e-3


def test_fewer_tokens_are_at_most_as_far(teacher):
    losses = []
    for k in (1, 8, VOCAB):
        objective = Objective("distill", teacher=teacher, teacher_top_k=k)
        course = replace(SEVERAL, steps=1, tokens_per_step=1000)
        losses += [step.loss for step in of(Step, run(student(), objective, course))]
    assert 0 < losses[0] < losses[1] < losses[2]


def student_nf4() -> Any:
    return student(quantized("llama"))


@pytest.mark.parametrize("base", [pytest.param(student, marks=pytest.mark.slow), student_nf4])
def test_a_run_goes_on_to_the_bit(base, teacher, tmp_path, monkeypatch):
    """The teacher is asked once for both runs, whose rows and settings are the same."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    asked_rows: list[int] = []
    records = teachers._records

    def counted(objective: Objective, model: Any, rows: list[Example], **more: Any) -> Any:
        asked_rows.append(len(rows))
        return records(objective, model, rows, **more)

    monkeypatch.setattr(teachers, "_records", counted)
    objective = Objective("distill", teacher=teacher, divergence="reverse", distill_temperature=2)
    options: dict[str, Any] = {"held_out": ROWS[:2], "identity": {"base": "tiny", "data": "rows"}}

    def seen(model: Any, place: Path, **more: Any) -> list[Any]:
        events = run(model, objective, directory=place, **options, **more)
        steps = [replace(step, seconds=0.0, rss_bytes=0) for step in of(Step, events)]
        return [*steps, *of(Evaluated, events), *of(Stopped, events)]

    whole, stopped, again = base(), base(), base()
    expected = seen(whole, tmp_path / "whole")
    assert asked_rows == [len(ROWS), 2]
    asked = iter([False, True])
    first = seen(stopped, tmp_path / "stopped", should_stop=lambda: next(asked))
    rest = seen(again, tmp_path / "stopped", resume=True)
    assert asked_rows == [len(ROWS), 2]
    before = checkpoint.newest(tmp_path / "stopped").identity  # which needs no more of the disk
    splits = {"train": ROWS, "valid": ROWS[:2]}
    assert teachers.bytes_of_teacher(objective, splits, VOCAB, before=before) == 0
    assert teachers.bytes_of_teacher(objective, splits, VOCAB, before={}) > 0
    assert len(of(Step, expected)) == SEVERAL.steps
    assert of(Step, first) + of(Step, rest) == of(Step, expected)
    assert of(Evaluated, first) + of(Evaluated, rest) == of(Evaluated, expected)
    assert same(trained_weights(again), trained_weights(whole))
    for file in cache.home().glob("*/teacher.npy"):
        kept = np.load(file, mmap_mode="r")
        # The first row's first label is predicted by nothing; the held-out rows begin with it too.
        assert not kept["log_p"][0].any()
        assert np.exp(kept["log_p"][1:]).sum(1) == pytest.approx(1, abs=1e-4)


def test_another_teacher_is_another_run(teacher, tmp_path):
    other = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=4)), seed=9, size=0.2)
    place = tmp_path / "taught"
    veneer.save(other, place)
    objective = Objective("distill", teacher=str(place))
    asked = iter([True])
    run(student(), objective, directory=tmp_path / "run", should_stop=lambda: next(asked))
    veneer.save(shake(other, seed=10, size=0.2), place)
    with pytest.raises(VeneerError, match="teacher_digest"):
        run(student(), objective, directory=tmp_path / "run", resume=True)


def test_it_shares_passes_with_answers(teacher):
    objectives = {"distill": Objective("distill", teacher=teacher), "sft": Objective()}
    course = replace(SEVERAL, save_every=None)
    alone, together = both(objectives), both(objectives)
    expected: dict[str, list[Step]] = {}
    for name, objective in objectives.items():
        veneer.use(alone, name)
        let_train(alone, name)
        expected[name] = of(Step, run(alone, objective, course))
        alone.requires_grad_(False)
    jobs = {name: veneer.Job(ROWS, course, objective) for name, objective in objectives.items()}
    events = list(veneer.train_many(together, jobs))
    for name, losses in expected.items():
        steps = [event for own, event in events if own == name and isinstance(event, Step)]
        assert [step.loss for step in steps] == pytest.approx(
            [step.loss for step in losses], rel=1e-4
        )


def both(names: Any) -> Any:
    model = tiny("llama")
    for number, name in enumerate(names):
        veneer.attach(model, veneer.LoRA(rank=2), name=name, seed=number)
    veneer.use(model, None)
    return model


def test_what_cannot_teach_is_refused_by_name(teacher, tmp_path):
    model = student()
    for name, error, says in (
        (str(tmp_path / "nothing"), ConfigError, "is no directory"),
        (str(tmp_path), AdapterError, str(tmp_path)),
    ):
        with pytest.raises(error, match=says):
            run(model, Objective("distill", teacher=name))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a whole model"):
        run(model, Objective("distill", teacher=str(tmp_path)))
    with pytest.raises(AdapterError, match="does not fit the base"):
        run(student(tiny("qwen2")), Objective("distill", teacher=teacher))


def test_packed_padded_and_one_by_one_are_as_far(teacher):
    """With a head of their own rows, and without; each token with another weight."""
    model, batch = shake(student(), size=0.2), pack(ROWS, [2, 0, 3, 1])
    forward, _ = choose_forward(model, ROWS)
    noted = Likeliest(6)
    with torch.no_grad():
        forward.losses(veneer.load(tiny("llama"), teacher), batch, noted)
    far = DistanceFromTeacher(torch.cat(noted.tokens).long(), torch.cat(noted.log_p))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    results = []
    for settings in ({}, {"packed": False}, {"packed": False, "alone": True}, {"head": None}):
        losses = replace(forward, **settings).losses(model, batch, far)
        gradients = torch.autograd.grad((losses * torch.arange(len(losses))).sum(), weights)
        results.append([losses.detach(), *gradients])
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=1e-3, atol=1e-4)


def test_what_a_teacher_gives_has_the_size_that_a_run_says(teacher, monkeypatch):
    for count in (3, VOCAB + 9):
        objective = Objective("distill", teacher=teacher, teacher_top_k=count)
        settings = {"identity": {}, "tokens_per_batch": 30}
        (criterion,) = teachers.distillation_over(objective, {"train": ROWS}, student(), **settings)
        size = teachers.bytes_of_teacher(objective, {"train": ROWS}, VOCAB, before={})
        assert criterion.teacher.values.nbytes == size
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    teachers.check_space_of_teacher(10**6)
    with pytest.raises(ConfigError, match=r"needs up to 2 MB in .* a lower --teacher-top-k"):
        teachers.check_space_of_teacher(2 * 10**6)
