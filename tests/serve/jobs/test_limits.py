"""What jobs may take, and what becomes of them when their server is gone."""

import http.client
import sqlite3
import subprocess
import time
from dataclasses import replace
from threading import Event

import openai
import pytest

from support.jobs import ROWS, client_of, training, until, until_step, upload
from support.server import ADMIN, AS_ADMIN, call, connected, running, scripted
from support.waiting import eventually
from veneer.errors import ConfigError, VeneerError
from veneer.serve.api.fine_tuning import shown
from veneer.serve.config import Keys, ServeConfig, read_keys
from veneer.serve.jobs import supervisor as supervisor_module
from veneer.serve.jobs.log import WorkerLog, read_on
from veneer.serve.jobs.pace import CAN_STOP, Pace
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.settings import TrainingBase
from veneer.serve.jobs.values import JobEvent
from veneer.serve.jobs.watching import Bounds


def test_training_is_off_unless_it_is_enabled():
    with running(scripted(), keys=Keys(admin=ADMIN)) as server:
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/files/file-1/content"):
            status, _, reply = call(server.url, path, headers=AS_ADMIN)
            assert (status, "--enable-training" in reply["error"]["message"]) == (404, True)


def test_what_is_too_large_or_too_many_is_refused(tmp_path):
    bounds = Bounds(upload_bytes=3000, disk_bytes=20_000_000, waiting=1)
    with training(tmp_path / "runs", bounds=bounds) as server:
        client = client_of(server)
        with pytest.raises(openai.APIStatusError) as refused:
            upload(client, ROWS * 4)
        assert refused.value.status_code == 413
        connection = http.client.HTTPConnection(server.url[7:], timeout=20)
        kind = {"content-type": "multipart/form-data; boundary=x"}
        chunks = (b"--x\r\n" + b"y" * 500 for _ in range(9))  # of a length that nobody tells
        connection.request("POST", "/v1/files", chunks, {**AS_ADMIN, **kind}, encode_chunked=True)
        assert connection.getresponse().status in (400, 413)
        connection.close()
        file = upload(client)
        (server.jobs.places.root / "wait").write_text("1")
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with pytest.raises(openai.RateLimitError):
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with (server.jobs.places.root / "large").open("wb") as large:
            large.truncate(20_000_000)
        with pytest.raises(openai.BadRequestError, match="delete files"):
            upload(client)


def test_a_client_that_goes_in_the_middle_of_a_file_leaves_nothing(tmp_path, caplog):
    head = [f"{name}: {value}" for name, value in AS_ADMIN.items()]
    head += ["host: localhost", "content-type: multipart/form-data; boundary=x"]
    start = "\r\n".join(["POST /v1/files HTTP/1.1", *head, "content-length: 900", "", "--x\r\n"])
    with training(tmp_path / "runs") as server:
        with connected(server.url, start.encode()):
            pass
        # Once the server has seen that the client is gone.
        metrics = lambda: call(server.url, "/metrics")[2]  # noqa: E731
        eventually(metrics, lambda text: 'responses_total{status="499"}' in text)
        assert client_of(server).files.list().data == []
        assert not [*server.jobs.places.root.glob("files/*")]
    assert not caplog.records


def test_a_job_ends_at_its_limit_and_can_go_on(tmp_path):
    with training(tmp_path / "runs") as server:
        client, supervisor = client_of(server), server.jobs.supervisor
        wait = server.jobs.places.root / "wait"
        wait.write_text("1")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client).id)
        until_step(client, job.id, 1)
        supervisor.bounds = Bounds(hours=0.01 / 3600)
        assert until(client, job.id, "failed").error.code == "time_limit"
        supervisor.bounds = Bounds()
        wait.unlink()
        client.fine_tuning.jobs.resume(job.id)
        assert until(client, job.id, "succeeded").step == 3


def test_a_store_that_cannot_be_read_for_a_moment_ends_no_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor_module, "PAUSE_SECONDS", 0.05)
    with training(tmp_path / "runs") as server:
        client, store = client_of(server), server.jobs.store
        file = upload(client)
        read = store.jobs

        def locked(*statuses):
            if statuses == ("running",):
                raise sqlite3.OperationalError("database is locked")
            return read(*statuses)

        monkeypatch.setattr(store, "jobs", locked)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        eventually(lambda: caplog.records)
        monkeypatch.setattr(store, "jobs", read)
        assert until(client, job.id, "succeeded").step == 3
    assert "database is locked" in caplog.text


def test_what_is_cancelled_at_its_end_stays_cancelled(tmp_path):
    with training(tmp_path / "runs") as server:
        client, supervisor = client_of(server), server.jobs.supervisor
        keep = supervisor.keep_results

        def cancel_meanwhile(job):
            server.jobs.cancel(job.id)
            return keep(job)

        supervisor.keep_results = cancel_meanwhile
        job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client).id)
        until(client, job.id, "cancelled")
        supervisor.end()
        supervisor.close()
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_the_time_that_is_left_outlives_a_pause(tmp_path):
    with training(tmp_path / "runs") as server:
        jobs, (wait, client) = server.jobs, (tmp_path / "runs" / "wait", client_of(server))
        wait.write_text("1")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client).id)
        until_step(client, job.id, 1)
        client.fine_tuning.jobs.pause(job.id)
        eventually(lambda: jobs.store.events(job.id, limit=1, kind="stopped"))
        jobs.supervisor.close()  # it counts seconds of its own
        jobs.store.change(job.id, seconds=100.0)
        assert jobs.resume(job.id).seconds == 100.0
        running, now = replace(jobs.job(job.id), status="running", step=1, steps=3), time.time()
        assert 199 <= shown(running)["estimated_finish"] - now <= time.time() - now + 201
        failed = replace(running, seconds=10.0, since=1, step=2)
        assert 9 <= shown(failed)["estimated_finish"] - now <= time.time() - now + 11
        wait.unlink()


def test_a_checkpoint_that_goes_meanwhile_ends_no_job(tmp_path, monkeypatch):
    with training(tmp_path / "runs") as server:
        client, publisher = client_of(server), server.jobs.publisher
        monkeypatch.setattr(
            publisher, "checkpoints", lambda job: {f"{job.name}.step-1": tmp_path / "gone"}
        )
        job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client).id)
        assert until(client, job.id, "succeeded", "failed").status == "succeeded"


def test_a_name_of_half_characters_can_be_listed(tmp_path):
    with training(tmp_path / "runs") as server:
        form = (
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="\\ud800.jsonl"\r\n\r\n'
            b'{"text": "a"}\r\n--x--\r\n'
        )
        connection = http.client.HTTPConnection(server.url[7:], timeout=20)
        kind = {"content-type": "multipart/form-data; charset=unicode_escape; boundary=x"}
        connection.request("POST", "/v1/files", form, {**AS_ADMIN, **kind})
        assert connection.getresponse().status == 200
        connection.close()
        assert [file.filename for file in client_of(server).files.list()] == ["?.jsonl"]


def test_the_next_server_goes_on_with_jobs_and_serves_their_results(tmp_path):
    runs = tmp_path / "runs"
    with training(runs) as server:
        client = client_of(server)
        file = upload(client)
        done = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        name = until(client, done.id, "succeeded").fine_tuned_model
        (runs / "wait").write_text("2")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        until_step(client, job.id, 2)
        with pytest.raises(VeneerError, match="Another server trains below"):
            Jobs(runs, scripted(), TrainingBase("tiny"))
    (runs / "wait").unlink()
    (runs / "files" / ".coming-file-half").mkdir()
    with training(runs) as server:
        assert not (runs / "files" / ".coming-file-half").exists()
        client = client_of(server)
        assert name in [model.id for model in client.models.list()]
        assert until(client, job.id, "succeeded").step == 3
        steps = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert len([text for text in steps if text.startswith("Step ")]) == 3


def test_a_log_is_read_on_over_half_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_on(path, 0) == ([], 0)
    WorkerLog(path, 1).add(JobEvent("one"))
    with path.open("ab") as file:
        file.write(b'{"attempt": 1, "mess')
    (first,), at = read_on(path, 0)
    assert first.content.message == "one"
    WorkerLog(path, 2).end("succeeded")
    (last,), at = read_on(path, at)
    assert (last.attempt, last.content.how) == (2, "succeeded")
    assert read_on(path, at) == ([], at)


@pytest.mark.skipif(not CAN_STOP, reason="only Linux wakes what is stopped when its server dies")
def test_a_worker_stands_still_while_answers_are_computed():
    busy = Event()
    with subprocess.Popen(["sleep", "60"]) as child:
        pace = Pace(child.pid, busy.is_set, share=0.0)
        pace.step()
        assert _state(child.pid) != "T"
        busy.set()
        pace.step()
        eventually(lambda: _state(child.pid), lambda state: state == "T")
        busy.clear()
        pace.step()
        eventually(lambda: _state(child.pid), lambda state: state != "T")
        child.kill()


def test_training_needs_a_key_and_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="enable_training needs runs"):
        ServeConfig(enable_training=True)
    config = ServeConfig(enable_training=True, runs=tmp_path)
    with pytest.raises(ConfigError, match="Training needs a key of its own"):
        read_keys(config, {})
    assert read_keys(config, {"VENEER_ADMIN_KEY": ADMIN}).admin == ADMIN
    with pytest.raises(ConfigError, match="training_share is 2, but must be from 0 to 1"):
        ServeConfig(enable_training=True, runs=tmp_path, training_share=2)


def _state(process: int) -> str:
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(") ")[2][0]
