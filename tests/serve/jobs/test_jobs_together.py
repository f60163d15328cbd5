"""Several jobs of a server in one process: who joins, who leaves, and what becomes of each."""

from threading import Event

import pytest

from support.jobs import client_of, training, until, until_step, upload
from support.waiting import eventually
from veneer.serve.jobs.settings import TrainingBase, settings_of, sharing_of
from veneer.serve.jobs.watching import Bounds


@pytest.fixture
def server(tmp_path):
    with training(tmp_path / "runs", bounds=Bounds(together=3)) as server:
        server.wait = server.jobs.places.root / "wait"
        server.wait.write_text("1")
        yield server


@pytest.fixture
def create(server):
    client = client_of(server)
    file = upload(client).id
    return lambda **own: client.fine_tuning.jobs.create(
        model="tiny", training_file=file, extra_body=own
    )


def texts(client, job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]


def until_it_stops(server, job):
    eventually(lambda: server.jobs.store.events(job.id, limit=1, kind="stopped"))


def processes(server, *jobs):
    """Return which of the jobs' runs began a worker."""
    runs = [server.jobs.places.run(server.jobs.job(job.id)) for job in jobs]
    return [job for job, run in zip(jobs, runs, strict=True) if (run / ".job/output.txt").exists()]


def test_jobs_join_leave_and_end_by_themselves(server, create):
    client = client_of(server)
    jobs = client.fine_tuning.jobs
    first, second, _, fourth = all_four = [create() for _ in range(4)]
    for job in all_four[:3]:
        until(client, job.id, "running")
    assert jobs.retrieve(fourth.id).status == "queued"
    # The place of one that is paused goes to the next.
    jobs.pause(second.id)
    until_it_stops(server, second)
    until(client, fourth.id, "running")
    # The one that began the process leaves it too, and the others go on.
    jobs.cancel(first.id)
    until_it_stops(server, first)
    jobs.resume(second.id)
    until(client, second.id, "running")
    server.wait.unlink()
    for job in all_four[1:]:
        done = until(client, job.id, "succeeded", "failed")
        assert (done.status, done.step) == ("succeeded", 3)
        assert done.fine_tuned_model in [model.id for model in client.models.list()]
        assert len([text for text in texts(client, job) if text.startswith("Step ")]) == 3
    assert jobs.retrieve(first.id).status == "cancelled"
    assert processes(server, *all_four) == [first]


def test_a_result_that_cannot_be_loaded_ends_no_other_job(server, create, monkeypatch):
    def load(name):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.jobs.served.engine, "load", load)
    server.wait.write_text("4")
    client = client_of(server)
    first, second = create(steps=5), create(steps=3)
    until(client, second.id, "succeeded", "failed")
    message = "It cannot be served: loading it ended in RuntimeError: out of memory"
    assert any(text.startswith(message) for text in texts(client, second))
    until_step(client, first.id, 4)
    assert client.fine_tuning.jobs.retrieve(first.id).status == "running"
    assert server.jobs.job(first.id).deaths == 0
    assert processes(server, first, second) == [first]


def test_an_end_that_cannot_be_noted_fails_that_job_alone(server, create, monkeypatch):
    def keep_results(job):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.jobs.supervisor, "keep_results", keep_results)
    server.wait.write_text("4")
    client = client_of(server)
    first, second = create(steps=5), create(steps=3)
    assert until(client, second.id, "succeeded", "failed").error.code == "server_error"
    until_step(client, first.id, 4)
    assert client.fine_tuning.jobs.retrieve(first.id).status == "running"
    assert server.jobs.job(first.id).deaths == 0


def test_a_paused_job_stops_while_answers_have_all_processors(tmp_path):
    runs, busy = tmp_path / "runs", Event()
    with training(runs, bounds=Bounds(together=2, share=0.0)) as server:
        (runs / "wait").write_text("1")
        server.jobs.supervisor.is_busy = busy.is_set
        client = client_of(server)
        file = upload(client).id
        first, second = (
            client.fine_tuning.jobs.create(model="tiny", training_file=file) for _ in range(2)
        )
        for job in (first, second):
            until_step(client, job.id, 1)
        busy.set()
        client.fine_tuning.jobs.pause(second.id)
        until_it_stops(server, second)
        assert client.fine_tuning.jobs.retrieve(first.id).status == "running"


def test_who_cannot_train_beside_others_trains_after_them(server, create):
    client = client_of(server)
    first, failing = create(), create(rank=13)
    assert until(client, failing.id, "failed").error.code == "invalid_training_file"
    apart = create(rank=12)
    refusal = "It cannot train beside the other jobs"
    eventually(lambda: " ".join(texts(client, apart)), lambda seen: refusal in seen)
    assert client.fine_tuning.jobs.retrieve(apart.id).status == "queued"
    assert client.fine_tuning.jobs.retrieve(first.id).status == "running"
    server.wait.unlink()
    for job in (first, apart):
        assert until(client, job.id, "succeeded", "failed").status == "succeeded"
    assert processes(server, first, apart, failing) == [first, apart]


def test_who_waits_is_passed_by_nobody(server, create):
    client = client_of(server)
    first, large, small = create(steps=5), create(tokens_per_step=4000), create()
    for step in (2, 3):  # between which the server has looked for whoever joins
        server.wait.write_text(str(step))
        until_step(client, first.id, step)
    assert client.fine_tuning.jobs.retrieve(small.id).status == "queued"
    server.jobs.pause(large.id)  # then it waits for nothing
    until(client, small.id, "running")
    server.jobs.resume(large.id)
    server.wait.write_text("4")  # behind the last step of the small one, and not of the first
    until(client, small.id, "succeeded")
    assert client.fine_tuning.jobs.retrieve(large.id).status == "queued"
    behind = [create(new_words="auto"), create()]
    server.wait.unlink()
    for job in (large, *behind):
        until(client, job.id, "succeeded")
    all_of_them = (first, large, small, *behind)
    assert processes(server, *all_of_them) == [first, large, *behind]


def test_jobs_whose_worker_dies_train_by_themselves(server, create):
    client = client_of(server)
    first = create()
    until(client, first.id, "running")
    deadly = create(rank=14)
    server.wait.unlink()
    assert until(client, first.id, "succeeded", "failed").status == "succeeded"
    assert "signal 9" in until(client, deadly.id, "failed").error.message
    assert processes(server, first, deadly) == [first, deadly]
    assert not [*server.jobs.places.root.glob("*/.job/joined-*")]


@pytest.mark.slow
def test_a_server_that_ends_leaves_all_of_them_to_the_next(tmp_path):
    runs, bounds = tmp_path / "runs", Bounds(together=2)
    with training(runs, bounds=bounds) as server:
        (runs / "wait").write_text("1")
        client = client_of(server)
        file = upload(client).id
        jobs = [client.fine_tuning.jobs.create(model="tiny", training_file=file) for _ in range(2)]
        for job in jobs:
            until_step(client, job.id, 1)
    (runs / "wait").unlink()
    with training(runs, bounds=bounds) as server:
        client = client_of(server)
        for job in jobs:
            assert until(client, job.id, "succeeded", "failed").step == 3
            assert "The fine-tuning job goes on." in texts(client, job)


def test_only_small_steps_over_one_base_share_passes(tmp_path):
    def key(base="tiny", grader=None, **own):
        paths = {"data": tmp_path, "valid": None, "out": tmp_path, "start_from": None}
        chosen = {"seed": 0, "hyperparameters": {}, "own": own, "grader": grader}
        settings = settings_of(TrainingBase(base), **paths, **chosen)
        return sharing_of(settings)

    assert key() == key(rank=3, targets="attention", lr=0.1, epochs=2.0) is not None
    assert key() != key("other")
    assert key() != key(recompute="full")
    for own in ({"new_words": "auto"}, {"tokens_per_step": 2049}, {"replay_passes": True}):
        assert key(**own) is None, own
    assert key(tokens_per_step=2048) == key(reference="base") == key()
    assert key(objective="dpo") == key()
    grader = {
        "type": "string_check",
        "name": "a",
        "input": "a",
        "reference": "a",
        "operation": "eq",
    }
    assert key(objective="grpo", grader=grader) is None
