"""The study of a search: which trials are judged, when, and what its file comes to."""

from __future__ import annotations

import math
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest

import veneer
from veneer.errors import StorageError
from veneer.training.events import Evaluated
from veneer.training.search import study
from veneer.training.search.result import TrialResult
from veneer.training.search.run import _Trials
from veneer.training.search.space import Range
from veneer.training.search.study import SearchStudy, study_errors

CONFIG = veneer.SearchConfig()
SPACE = {"lr": Range(1e-3, 1e-1, log=True, whole=False)}


def test_who_came_first_to_a_point_makes_way_once_others_are_better(tmp_path):
    file = tmp_path / "as an address? %41 {it} is#another" / "study.db"
    study = SearchStudy(file, SPACE, CONFIG, seed=0, steps=72)
    assert file.exists()
    first, second, third = (study.ask().number for _ in range(3))
    assert not study.report(first, 11, 3.0)
    assert study.overtaken() == set()
    assert not study.report(second, 11, 2.0)
    assert study.overtaken() == {first}
    assert not study.report(second, 33, 1.9)
    assert not study.report(third, 11, 1.5)
    assert study.overtaken() == {first}  # the second is past the point
    assert not study.report(third, 33, 1.4)
    assert study.overtaken() == {first, second}
    assert not study.report(second, 67, 1.8)
    assert study.overtaken() == {first}


@pytest.mark.parametrize(
    ("steps", "points"),
    [(72, [11, 33]), (67, [11, 33]), (66, [33]), (24, [33]), (23, [67]), (12, [67]), (11, [])],
)
def test_no_trial_is_judged_by_its_first_steps(tmp_path, steps, points):
    halving = SearchStudy(tmp_path / "halving.db", {}, CONFIG, seed=0, steps=steps)
    assert [*halving.points] == points
    median = SearchStudy(
        tmp_path / "median.db", {}, veneer.SearchConfig(pruner="median"), seed=0, steps=steps
    )
    for _ in range(5):
        number = median.ask().number
        for ninth in range(1, 9):
            bad, step = number == 4, math.ceil(ninth * steps / 9)
            makes_way = median.report(number, round(100 * step / steps), float(bad))
            assert makes_way == (bad and 8 <= step < steps)
        median.end(TrialResult(number, {}, "complete", {100: 0.0}))


def test_the_best_never_makes_way_however_far_it_got_when_it_was_overtaken(tmp_path):
    trials = object.__new__(_Trials)
    trials.study = SearchStudy(tmp_path / "study.db", SPACE, CONFIG, seed=0, steps=72)
    trials.unsaid, trials.leaving = [], set()
    trials.training = {trial.name: trial for trial in (trials.study.ask(), trials.study.ask())}
    first, second = trials.training
    trials.steps = {first: 9, second: 9}

    def leaving_after(name: str, step: int, loss: float) -> set[str]:
        list(trials.take(name, Evaluated(step, loss, math.exp(loss), True)))
        return trials.leaving

    assert leaving_after(first, 1, 2.0) == set()
    assert leaving_after(second, 1, 1.9) == {first}
    assert leaving_after(first, 3, 1.2) == set()  # it came that far with its last pass
    assert leaving_after(second, 3, 1.4) == {second}


def test_a_file_that_is_no_study_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "study.db").write_text("no database, whatever its name says" * 9)
    with pytest.raises(veneer.VeneerError, match=r"study\.db cannot be opened .* --force"):
        SearchStudy(tmp_path / "study.db", {}, CONFIG, seed=0, steps=72)


def test_a_trial_that_is_measured_seldom_is_judged_where_it_is_measured_next(tmp_path):
    study = SearchStudy(tmp_path / "study.db", SPACE, CONFIG, seed=0, steps=72)
    first, second = (study.ask().number for _ in range(2))
    for done in (11, 33, 67):
        study.report(first, done, 1.0)
    study.report(second, 11, 0.9)
    study.report(second, 69, 2.0)
    assert study.overtaken() == {second}
    study.report(second, 80, 1.9)  # it goes on, since its pass was under way
    assert study.overtaken() == set()


def test_who_has_come_to_the_end_makes_way_for_nobody(tmp_path):
    study = SearchStudy(tmp_path / "study.db", SPACE, CONFIG, seed=0, steps=12)
    first, second = (study.ask().number for _ in range(2))
    study.report(first, 67, 2.0)
    assert study.overtaken() == set()
    study.report(first, 100, 1.9)
    study.report(second, 67, 1.0)
    assert study.overtaken() == set()


def test_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def small(path: Path, **options: Any) -> Any:
        connection = connect(path, **options)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(study, "connect", small)
    pages = 9
    with pytest.raises(StorageError, match=r"a/study\.db cannot be written: the disk is full"):
        SearchStudy(tmp_path / "a" / "study.db", {}, CONFIG, seed=0, steps=72)
    pages, path = 99, tmp_path / "study.db"
    kept = SearchStudy(path, {}, CONFIG, seed=0, steps=72)
    with pytest.raises(StorageError, match="full"), study_errors(path):
        kept.settle({"data": "x" * 10**6})
    with pytest.raises(ZeroDivisionError), study_errors(path):
        1 / 0  # noqa: B018
