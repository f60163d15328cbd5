"""Large data as a table on the disk: the same rows, faults and order as of a list in memory."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import veneer
from support.row_tables import both_ways, result_of
from veneer.data import blocks, cache, load, stream, table, workers
from veneer.data.blocks import Block, blocks_of
from veneer.data.chunk import Chunk
from veneer.data.columns import COLUMNS, column_of, select
from veneer.data.load import RowFiles
from veneer.data.packing import pack
from veneer.data.table import all_but
from veneer.errors import DataError, StorageError
from veneer.machine import Cores
from veneer.training.events import DataReady, Encoding, Evaluated, Notice, Step


def write_rows(folder: Path) -> list[Path]:
    """Write files of all kinds, some rows of them with faults, long, or with keys to spare."""
    asked = [{"prompt": f"What is {n}?", "completion": f"It is {n} and more. " * (n % 5 + 1)}
             for n in range(40)]  # fmt: skip
    asked[7] = {"prompt": "no answer"}
    asked[9]["mood"] = "good"
    asked[11] = {"text": "A dog says woof. " * 40}
    asked[13] = asked[3]
    lines = [json.dumps(row) for row in asked]
    lines[5] = '{"prompt": '
    lines[20] = ""
    text = "\n".join(lines)
    (folder / "a.jsonl").write_text(text)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.jsonl.zst").write_bytes(pa.Codec("zstd").compress(text.encode(), asbytes=True))
    good = [row for row in asked if set(row) == {"prompt", "completion"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(good), folder / "d.parquet")
    (folder / "e.txt").write_text("A short one.\n\n" + "A cat says meow.\n" * 30 + "\n\nEnd here.")
    (folder / "f.csv").write_text("prompt,completion\n" + "a,b c d\n" * 9 + "only one\n")
    (folder / "g.json").write_text(json.dumps(asked[:30]))
    return sorted(folder.iterdir())


SETTINGS = [
    {"max_length": 64},
    {"max_length": 24, "long_rows": "split"},
    {"max_length": 24, "long_rows": "drop"},
    {"max_length": 24, "long_rows": "error"},
    {"max_length": 64, "limit": 25},
    {"max_length": 64, "limit": 60},
]


def test_a_table_is_the_list_that_it_replaces(streamed, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    files = write_rows(folder)
    for settings in SETTINGS:
        listed, tabled = both_ways(files, tokenizer, monkeypatch, **settings)
        assert list(tabled.examples) == listed.examples
        for column in COLUMNS:
            expected = column_of(listed.examples, column)
            assert column_of(tabled.examples, column).tolist() == expected.tolist()
        for name in ("of_sources", "dropped", "split", "systems", "problem_count"):
            assert getattr(tabled, name) == getattr(listed, name), name
        assert dict(tabled.unused) == dict(listed.unused)
        assert sorted(map(str, tabled.all_problems())) == sorted(map(str, listed.problems))
        rows = np.array([3, 0, 3, len(listed.examples) - 1])
        assert list(select(tabled.examples, rows)) == select(listed.examples, rows)
        assert listed.problem_count >= 8 or "limit" in settings
        batches = [pack(examples, rows.tolist()) for examples in (listed.examples, tabled.examples)]
        assert batches[0].labels.tolist() == batches[1].labels.tolist()


def test_a_second_run_reads_what_the_first_wrote(streamed, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    file = folder / "a.jsonl"
    first = result_of(RowFiles(file).load(tokenizer, max_length=64)).examples

    def never(*args):
        raise AssertionError("encoded again")
        yield

    with monkeypatch.context() as second:
        second.setattr(stream, "done_by_all_cores", never)
        again = result_of(RowFiles(file).load(tokenizer, max_length=64)).examples
        assert list(again) == list(first)
        assert again.digest == first.digest
        moved = file.rename(folder / "moved.jsonl")
        elsewhere = result_of(RowFiles(moved).load(tokenizer, max_length=64)).examples
        assert elsewhere[0].where == f"{moved}:1"
        with pytest.raises(AssertionError, match="encoded again"):
            result_of(RowFiles(moved).load(tokenizer, max_length=63))
    moved.write_text(moved.read_text().replace("What", "whaT"))
    assert list(result_of(RowFiles(moved).load(tokenizer, max_length=64)).examples) != list(first)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "d.parquet"])
def test_what_was_encoded_before_a_kill_stays(streamed, tokenizer, tmp_path, monkeypatch, name):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    file = folder / name
    expected = list(result_of(RowFiles(file).load(tokenizer, max_length=64)).examples)
    (directory,) = cache.home().iterdir()
    (directory / stream.INDEX).unlink()
    chunks = sorted(directory.glob("chunk-*.arrow"))
    lost = [chunks[1], chunks[-1]]
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:50])  # a machine that lost its power
    made = []

    def watched(task, waiting):
        for block in waiting:
            made.append(block.number)
            yield block.number, len(block.lines or ()), task.do(block)

    monkeypatch.setattr(stream, "done_by_all_cores", watched)
    again = result_of(RowFiles(file).load(tokenizer, max_length=64))
    assert list(again.examples) == expected
    assert made == [1, len(chunks) - 1]


def test_a_run_waits_for_another_that_encodes_the_same(streamed, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    files = RowFiles(file)
    key = cache.key_of([file], tokenizer, {"max_length": 9, "long_rows": None, "limit": None})
    with cache.locked(cache.home() / key) as alone:
        assert alone
        waits = files.load(tokenizer, max_length=9)
        assert next(waits).waiting
    assert len(result_of(waits).examples) == 1


def test_a_spoilt_cache_is_mended(streamed, tokenizer, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    files = RowFiles(folder / "a.jsonl")
    expected = list(result_of(files.load(tokenizer, max_length=64)).examples)
    (directory,) = cache.home().iterdir()
    for name in (stream.INDEX, "chunk-000001.arrow", "lengths.npy"):
        for content in (None, b"{"):
            (directory / name).unlink()
            if content:
                (directory / name).write_bytes(content)
            assert list(result_of(files.load(tokenizer, max_length=64)).examples) == expected
    words = result_of(files.words())
    (spoilt,) = cache.home().glob(f"*/{stream.WORDS}")
    spoilt.write_bytes(b"{")
    assert result_of(files.words()) == words


def test_a_cache_that_cannot_be_written_is_an_error(streamed, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a b"}))
    with pytest.raises(DataError, match=r"cannot be kept in .*Not a directory.* VENEER_CACHE"):
        result_of(RowFiles(rows).load(tokenizer, max_length=9))


def test_what_nothing_uses_is_removed(streamed, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    for text in ("b", "c"):
        file.write_text(json.dumps({"prompt": "a", "completion": text}))
        result_of(RowFiles(file).load(tokenizer, max_length=9))
        old = time.time() - 86400 * (cache.DAYS + 1)
        for used in cache.home().glob(f"*/{cache.USED}"):
            os.utime(used, (old, old))
    assert len(list(cache.home().iterdir())) == 1


def test_a_large_file_counts_by_its_size_its_time_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WHOLE_FILE", 100)
    monkeypatch.setattr(cache, "SAMPLE", 4)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bytes(1000))
    os.utime(file, (1, 1))
    before = cache.identity_of(file)
    for place in (0, 999):
        changed = bytearray(1000)
        changed[place] = 1
        file.write_bytes(changed)
        os.utime(file, (1, 1))
        assert cache.identity_of(file) != before
    file.write_bytes(bytes(1000))
    assert cache.identity_of(file) != before
    os.utime(file, (1, 1))
    assert cache.identity_of(file) == before


def test_a_run_over_a_table_is_the_run_over_the_list(streamed, minigpt_home, tmp_path, monkeypatch):
    """Held-out rows, order, packing and losses, to the bit; and either goes on as the other."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} a", "completion": "b c d " * (n % 7 + 1)} for n in range(30)]
    data.write_text("\n".join(map(json.dumps, [*rows, rows[3], rows[20]])))
    settings = veneer.DataConfig(eval_rows=9, new_words="auto", deduplicate=True)
    training = veneer.TrainConfig(epochs=1, tokens_per_step=100, lr=1e-3)

    def events(out, most=None, **more):
        recipe = veneer.Recipe(
            str(minigpt_home), data, rows=settings, training=training, out=tmp_path / out
        )
        steps = iter([False] * (most or 10**6))
        return list(veneer.tune(recipe, should_stop=lambda: next(steps, True), **more))

    def numbers(of):
        return [(e.step, getattr(e, "loss", None) or e.eval_loss)
                for e in of if isinstance(e, Step | Evaluated)]  # fmt: skip

    tabled = events("table")
    assert any(isinstance(e, Encoding) for e in tabled)
    with monkeypatch.context() as small:
        small.setattr(load, "SMALL", 2**30)
        listed = events("list")
        events("going-on", most=2)
    assert numbers(tabled) == numbers(listed)
    assert [e.text for e in tabled if isinstance(e, Notice) and "dedup" in e.text]
    ready = [next(e for e in run if isinstance(e, DataReady)) for run in (tabled, listed)]
    assert ready[0] == ready[1]
    assert ready[0].summary.rows == 21
    gone_on = events("going-on", resume=True)
    assert numbers(gone_on) == numbers(listed)[-len(numbers(gone_on)) :]
    removed = (tmp_path / "table/duplicates.txt").read_text()
    assert removed == f"{data}:31 is {data}:4\n{data}:32 is {data}:21\n"


def test_all_faults_are_in_a_file_where_they_are_many(
    streamed, minigpt_home, tmp_path, monkeypatch
):
    data = tmp_path / "rows.jsonl"
    data.write_text("[]\n" * 70 + json.dumps({"prompt": "a", "completion": "b"}))
    recipe = veneer.Recipe(str(minigpt_home), data, out=tmp_path / "out")
    for size in (-1, 2**30):
        monkeypatch.setattr(load, "SMALL", size)
        with pytest.raises(DataError, match="70 of 71 rows cannot be used") as error:
            list(veneer.tune(recipe))
        faults = recipe.out / "faults.txt"
        assert f"and 20 more; all of them are in {faults}" in str(error.value)
        assert str(error.value).count("must be an object") == 50
        lines = faults.read_text().splitlines()
        assert lines == [f"{data}:{n}: a row must be an object, not a list" for n in range(1, 71)]
        faults.unlink()


def test_a_damaged_or_empty_file_is_named(streamed, tokenizer, tmp_path):
    for name, content, says in [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a b"}\n' * 50)[:-20], "cannot be read"),
        ("b.jsonl.zst", b"no zstd", "cannot be read"),
        ("c.jsonl", b"", "holds no rows"),
    ]:
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{name} {says}"):
            result_of(RowFiles(file).load(tokenizer, max_length=9))


def test_columns_of_many_rows_are_on_the_disk(monkeypatch):
    monkeypatch.setattr(table, "IN_MEMORY", 10)
    remaining = all_but(95, np.array([0, 9, 10, 94]))
    assert isinstance(remaining, np.memmap)
    assert remaining.tolist() == [n for n in range(95) if n not in (0, 9, 10, 94)]


def test_a_full_disk_is_an_error_before_a_column_is_mapped(monkeypatch):
    def full(file, start, size):
        assert (start, size) == (0, 91 * 8)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(table, "IN_MEMORY", 10)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="the disk is full"):
        all_but(95, np.array([0, 9, 10, 94]))


ENCODE = """
import sys
from pathlib import Path
from veneer.data import blocks, load
from veneer.models.load import load_config_and_tokenizer
load.SMALL, blocks._LEAST, blocks._MOST = -1, 20_000, 20_000
tokenizer = load_config_and_tokenizer(sys.argv[2])[1]
for progress in load.RowFiles(Path(sys.argv[1])).load(tokenizer, max_length=64):
    print(progress.rows, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on(minigpt_home, tokenizer, tmp_path, monkeypatch):
    """With processes of its own, which end with the run, whatever ends it."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "SMALL", -1)
    monkeypatch.setattr(blocks, "_LEAST", 20_000)
    monkeypatch.setattr(blocks, "_MOST", 20_000)
    monkeypatch.setattr(workers, "cores", lambda: Cores(1, 1, None))
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "What is it?", "completion": "It is what it is. " * 3})
    file.write_text("\n".join([row] * 3000))
    run = subprocess.Popen(
        [sys.executable, "-c", ENCODE, str(file), str(minigpt_home)], stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    while int(run.stdout.readline()) == 0:
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    (directory,) = cache.home().iterdir()
    before = {path: path.stat().st_mtime_ns for path in directory.glob("chunk-*.arrow")}
    assert before
    assert not (directory / stream.INDEX).exists()
    loaded = result_of(RowFiles(file).load(tokenizer, max_length=64))
    assert len(loaded.examples) == 3000
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert loaded.examples[2999].where == f"{file}:3000"
    assert sum(Chunk(p).about.examples for p in directory.glob("chunk-*.arrow")) == 3000


def test_blocks_are_the_lines_of_a_file_whatever_is_done(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc2\x85\\u2028"}\n{"a": 2}')
    found = list(blocks_of([file], 8, {}))
    assert b"".join(block.lines or b"" for block in found) == file.read_bytes()
    values = [entry for block in found for entry in block.entries("f")]
    assert [str(value.place) for value in values] == ["f:1", "f:3", "f:4"]
    done = {0: found[0].about, 2: found[2].about}
    assert [block.number for block in blocks_of([file], 8, done)] == [1]
    assert isinstance(found[0], Block)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt", "rows.json"])
def test_blocks_of_values_are_no_longer_than_those_of_lines(name, tmp_path):
    file = tmp_path / name
    rows = [{"text": f"{n} " * 50} for n in range(10, 30)]  # of 150 characters
    text = {
        ".csv": "text\n" + "\n".join(row["text"] for row in rows),
        ".txt": "\n\n".join(row["text"] for row in rows),
        ".json": json.dumps(rows),
    }
    if file.suffix in text:
        file.write_text(text[file.suffix])
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    made = list(blocks_of([file], 600, {}))
    assert [len(block.values) for block in made] == [4] * 5
    assert [entry.value for block in made for entry in block.values] == rows
    assert [len(block.values) for block in blocks_of([file], 10**6, {})] == [20]
