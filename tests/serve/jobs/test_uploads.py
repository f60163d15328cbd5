"""Files that clients send: read beside the answers, within bounds, and never lost."""

import errno
import json
from threading import Barrier, Thread

import openai
import pytest
from starlette.datastructures import UploadFile

from support.file_trees import on_disk_before_it_is_renamed
from support.jobs import ROWS, client_of, training, upload
from support.server import AS_ADMIN, call
from veneer import files
from veneer.data import sources
from veneer.data.sources import read_rows
from veneer.errors import QueueFull, RequestError, StorageError
from veneer.serve.jobs import uploads
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import Job, JobEvent, Places


def test_a_large_file_of_one_value_is_read_elsewhere_with_its_places(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    rows = [*ROWS[:3], {"prompt": 5}, *ROWS[3:]]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    expected = read_rows(path, limit=5)
    assert len(expected[1]) == 1
    assert expected[0][4].place.number == 7
    monkeypatch.setattr(uploads, "LARGE", 100)
    assert uploads.first_rows(path, 5, "answers") == expected
    # Whatever is large, but read row by row, stays in this process.
    monkeypatch.setattr(uploads, "_elsewhere", None)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(uploads.first_rows(lines, 5, "answers")[0]) == 5


def test_only_some_large_files_are_read_at_a_time_and_not_for_ever(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text("[]")
    monkeypatch.setattr(uploads, "READING_SECONDS", 1e-3)
    for _ in range(3):  # each gives its place back
        with pytest.raises(RequestError, match=r"rows\.json cannot be read in 0\.001 seconds"):
            uploads._elsewhere("count", path)
    with uploads._READING, uploads._READING, pytest.raises(QueueFull, match="2 large files"):
        uploads._elsewhere("count", path)


def test_files_outlive_their_database_and_half_a_file_does_not(tmp_path):
    runs = tmp_path / "runs"
    with training(runs) as server:
        file = upload(client_of(server))
    (path,) = (runs / "files").glob("*/rows.jsonl")
    half = runs / "files" / f"{uploads.UNFINISHED}file-0" / "rows.jsonl"
    half.parent.mkdir()
    half.write_text("{")
    for lost in runs.glob("jobs.sqlite*"):
        lost.unlink()
    with training(runs) as server:
        client = client_of(server)
        assert client.files.list().data == []
        assert upload(client).rows == file.rows
    assert path.exists()
    assert not half.parent.exists()


def test_a_file_is_on_the_disk_before_it_is_taken_in(tmp_path, monkeypatch):
    with training(tmp_path / "runs") as server, on_disk_before_it_is_renamed(monkeypatch) as names:
        file = upload(client_of(server))
        assert file.id in names


def test_a_list_goes_on_behind_what_is_in_it_alone(tmp_path):
    with training(tmp_path / "runs") as server:
        file = upload(client_of(server))
        for path in ("/v1/files", "/v1/fine_tuning/jobs"):
            status, _, reply = call(server.url, f"{path}?after=x", headers=AS_ADMIN)
            assert (status, reply["error"]["param"]) == (400, "after")
        assert client_of(server).files.list(after=file.id).data == []
        with pytest.raises(openai.BadRequestError, match="training_file should have at most 80 ch"):
            client_of(server).fine_tuning.jobs.create(model="tiny", training_file="x" * 81)


def test_no_more_jobs_are_taken_than_may_wait(tmp_path):
    store, begin, taken = Store(tmp_path / "jobs.sqlite"), Barrier(8), []

    def add(number: int) -> None:
        job = Job(f"ftjob-{number}", "tiny", f"run-{number}", 0, "file-1", {}, {})
        begin.wait()
        taken.append(store.add_job(job, [JobEvent("Created.")], most=3))

    threads = [Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True] * 3
    assert len(store.jobs()) == 3
    store.close()


def test_what_was_coming_or_going_when_a_server_was_killed_is_whole_or_gone(tmp_path):
    places = Places(tmp_path)
    store = Store(places.database)
    kept = uploads.keep_text(store, places, "a.csv", "1", "fine-tune-results")
    path = places.file(kept)
    unfinished = path.parent.with_name(f"{uploads.UNFINISHED}{kept.id}")
    path.parent.rename(unfinished)  # the store knows it, and it has no name yet
    uploads.settle_unfinished(store, places)
    assert path.read_text() == "1"
    path.parent.rename(unfinished)
    store.remove_file(kept.id)
    uploads.settle_unfinished(store, places)
    assert list(places.files.iterdir()) == []
    store.close()


def test_a_full_disk_is_no_fault_of_the_request_and_nothing_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def full_already(*_):
        full()

    with training(tmp_path / "runs") as server:
        client = client_of(server)
        coming, kept = (UploadFile, "write", full_already), (files, "_take_place", full)
        for owner, name, fails in (coming, kept):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fails)
                with pytest.raises(openai.InternalServerError, match="disk is full") as refused:
                    upload(client)
            assert refused.value.status_code == 507
            assert str(tmp_path) not in str(refused.value)
            assert not list((tmp_path / "runs").glob("files/*"))
            assert client.files.list().data == []
        assert upload(client).rows == len(ROWS)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OSError(errno.EIO, "Input/output error"), StorageError),  # the server's disk
        (OSError("not a gzipped file"), RequestError),  # what was sent
    ],
)
def test_rows_that_the_disk_does_not_give_are_not_the_client_s_fault(
    error, becomes, tmp_path, monkeypatch
):
    def fails(file, parse):
        with sources.readable(file):
            raise error

    monkeypatch.setattr(uploads, "parsed_values", fails)
    with pytest.raises(becomes, match=r"rows\.jsonl cannot be read"):
        uploads.check_rows(tmp_path / "rows.jsonl")


def test_a_file_that_cannot_be_removed_for_good_stays(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    places = Places(tmp_path)
    store = Store(places.database)
    kept = uploads.keep_text(store, places, "a.csv", "1", "fine-tune-results")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", fails)
        with pytest.raises(StorageError):
            uploads.remove(store, places, kept)
    assert places.file(kept).read_text() == "1"
    uploads.remove(store, places, kept)
    assert list(places.files.iterdir()) == store.files() == []
    store.close()


def test_a_file_goes_also_where_the_store_cannot_note_it(tmp_path, monkeypatch):
    def fails(id):
        raise StorageError("the disk is full")

    places = Places(tmp_path)
    store = Store(places.database)
    kept = uploads.keep_text(store, places, "a.csv", "1", "fine-tune-results")
    with monkeypatch.context() as patch:
        patch.setattr(store, "remove_file", fails)
        uploads.remove(store, places, kept)
    assert store.files() == [kept]
    assert list(places.files.iterdir()) == uploads.known(store, places) == []
    store.close()


def test_a_name_that_cannot_be_brought_to_the_disk_is_none(tmp_path, monkeypatch):
    def fails(path):
        if path == places.files:
            raise OSError(errno.EIO, "Input/output error")

    places = Places(tmp_path)
    store = Store(places.database)
    monkeypatch.setattr(files, "_sync", fails)
    with pytest.raises(StorageError):
        uploads.keep_text(store, places, "a.csv", "1", "fine-tune-results")
    assert list(places.files.iterdir()) == store.files() == []
    store.close()


def test_a_store_on_a_full_disk_says_so_and_keeps_what_it_has(tmp_path):
    places = Places(tmp_path)
    store = Store(places.database)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        for number in range(1000):
            uploads.keep_text(store, places, f"{number}.csv", "1", "fine-tune-results")

    with pytest.raises(StorageError, match=r"jobs\.sqlite cannot be written: the disk is full"):
        fill()
    assert len(store.files()) == len(list(places.files.iterdir())) > 0
    store.close()
