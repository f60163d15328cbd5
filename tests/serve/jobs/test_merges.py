"""Merging on demand: the true process' model and certificate, and what becomes of a merge."""

import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import veneer
from support.jobs import MERGER
from support.random_adapters import shake, tokenizer
from support.server import scripted
from support.tiny_models import tiny
from support.waiting import eventually
from veneer.errors import QueueFull
from veneer.files import write_json
from veneer.models.fingerprint import base_parameters
from veneer.serve.jobs.certificate import certificate_of
from veneer.serve.jobs.merge_worker import merge_in
from veneer.serve.jobs.merges import STATE, Merge, Merges
from veneer.serve.jobs.messages import event_of
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.settings import TrainingBase
from veneer.training.events import Merged

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    veneer.write_model(tiny("llama"), tokenizer(), home / "base")
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all")))
    veneer.save(model, home / "one")
    veneer.save(veneer.attach(tiny("llama"), veneer.Method("prefix")), home / "prefix")
    return home


def merged(home, adapter, *, most_bytes=GIGABYTE):
    """Return what the process leaves of a merge."""
    place = home / "merged" / f"{adapter}-{most_bytes}"
    place.mkdir(parents=True)
    base = asdict(TrainingBase(str(home / "base"), "float32", device="cpu"))
    asked = Merge("one", str(home / adapter), str(place / "model"), base, most_bytes)
    write_json(place / STATE, asdict(asked))
    merge_in(place)
    merge = Merges(place.parent, TrainingBase("x"), is_busy=bool, share=1.0).find(place.name)
    assert merge is not None
    return merge


def test_the_model_is_merge_s_and_the_certificate_certify_s(home):
    merge = merged(home, "one")
    assert (merge.state, merge.why, merge.doing) == ("done", "", "")
    model = veneer.load(tiny("llama"), home / "one")
    plain = veneer.merge(model)
    written = veneer.load_base(merge.model, dtype="float32", device="cpu").model
    ours, expected = base_parameters(written), base_parameters(plain)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    report = veneer.certify(model, plain, tokenizer())
    assert merge.certificate == certificate_of(report)
    assert merge.certificate["effect"] > 0
    # What a job merges at its end says the same.
    event = event_of(Merged(report), 3)
    assert event is not None
    assert event.data == {"certificate": merge.certificate}


@pytest.mark.parametrize(
    ("adapter", "most", "why"),
    [
        ("prefix", GIGABYTE, "cannot be merged"),
        ("nothing", GIGABYTE, "nothing"),
        ("one", 1000, "The merged model takes"),
    ],
)
def test_why_there_is_none(home, adapter, most, why):
    merge = merged(home, adapter, most_bytes=most)
    assert merge.state == "failed"
    assert why in merge.why


def test_a_number_that_is_not_finite_is_none():
    report = SimpleNamespace(
        dtype="bfloat16", tokens=3, lost=0.5, effect=1.0, divergence=float("inf"), worst=None
    )
    report.problems = lambda: ["its output is inf nats"]
    assert certificate_of(report)["divergence"] is None


@pytest.fixture
def merges(tmp_path):
    merges = Merges(tmp_path, TrainingBase("tiny"), is_busy=bool, share=1.0, worker=MERGER)
    yield merges
    merges.close()


def until_ended(merges, name):
    return eventually(lambda: merges.find(name), lambda merge: merge.state != "running")


def test_one_goes_on_at_a_time_and_a_dead_one_has_failed(merges, tmp_path):
    (tmp_path / "wait").touch()
    merges.start("a", tmp_path, 1)
    with pytest.raises(QueueFull, match="Another adapter is merged now"):
        merges.start("b", tmp_path, 1)
    (tmp_path / "wait").unlink()
    ended = until_ended(merges, "a")
    assert (ended.state, ended.why) == ("done", "")
    merges.close()
    again = Merges(tmp_path, TrainingBase("tiny"), is_busy=bool, share=1.0, worker=MERGER)
    (tmp_path / "die").touch()
    again.start("a", tmp_path, 1)  # in place of the first
    failed = until_ended(again, "a")
    assert failed.state == "failed"
    assert "signal 9" in failed.why
    again.close()


def test_a_process_that_does_not_start_has_failed(tmp_path):
    merges = Merges(tmp_path, TrainingBase("x"), is_busy=bool, share=1.0, worker=("/no/such",))
    merges.start("a", tmp_path, 1)
    assert "did not start" in until_ended(merges, "a").why
    merges.close()


def test_a_merge_of_what_a_name_meant_before_is_none(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (tmp_path / "runs").mkdir()
    jobs = Jobs(
        tmp_path / "runs",
        scripted({"one": tmp_path / "one"}),
        TrainingBase("tiny"),
        merger=MERGER,
    )

    def state():
        merge = jobs.merged("one")
        return None if merge is None else merge.state

    jobs.merge("one")
    assert until_ended(jobs.merges, "one").state == state() == "done"
    jobs.served.library.add("one", tmp_path / "other")
    assert state() is None
    jobs.served.library.add("one", tmp_path / "one")
    assert state() == "done"
    os.utime(tmp_path / "one" / "weights", (1, 2**32))  # it was replaced in its place
    assert state() is None
    (tmp_path / "runs" / "merged" / "wait").touch()
    jobs.merge("one")
    assert state() == "running"
    jobs.close()


def test_what_a_server_left_has_failed(merges, tmp_path):
    (tmp_path / "wait").touch()
    merges.start("a", tmp_path, 1)
    merges.close()  # which waits for nothing
    assert merges.find("a").why == "The server ended meanwhile."
    write_json(tmp_path / "a" / STATE, asdict(Merge("a", "x", "y")))
    later = Merges(tmp_path, TrainingBase("tiny"), is_busy=bool, share=1.0)
    assert later.find("a").state == "failed"
    (tmp_path / "a" / STATE).write_text("{")
    assert later.find("a") is None


def test_no_name_leads_out_of_the_directory(merges, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    write_json(outside / STATE, asdict(Merge("x", "x", "/etc", state="done")))
    for name in (f"../{outside.name}", str(outside), "..", ""):
        assert merges.find(name) is None
