"""Prefix blocks in files: the same to the bit after a restart, bounded, and never in anybody's
way."""

import logging
import os
import shutil
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import ids
from support.recorders import StandIn
from support.serving_bases import base_of, write_adapter
from support.waiting import eventually
from veneer.errors import VeneerError
from veneer.generate.runners.compiled import KVBlock
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.kernels.graphs import Graphs
from veneer.models.load import Base
from veneer.serve.engine import engine as engines
from veneer.serve.engine import identity, prefix_files
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.identity import identity_of_blocks
from veneer.serve.engine.library import Library
from veneer.serve.engine.prefix_files import ENDING, PrefixFiles
from veneer.serve.engine.request import Answer, EngineConfig, Request

PROMPT = tuple(ids(1, 50, seed=5)[0].tolist())  # three blocks and two tokens
WHOLE = 48
RUNNERS: dict[str, Any] = {
    "compiled": None,
    "general": lambda model, slots, context: (GeneralRunner(model, slots), ()),
    "slots": lambda model, slots, context: (
        SlotRunner(model, slots, context, Graphs(StandIn())),
        (),
    ),
}


def config(place: Path, size: int = 10**9) -> EngineConfig:
    return EngineConfig(slots=4, chunk=16, cache_directory=place, cache_file_bytes=size)


def asked(which: str | None = None, **options: Any) -> Request:
    sampling = Sampling(max_new_tokens=6)
    return Request(PROMPT, which, **{"sampling": sampling, "logprobs": 2, **options})


def answered(place: Path, *requests: Request, library: Library | None = None) -> list[Answer]:
    """Return what an engine that was just started answers, one after another."""
    with Engine(base_of(), library, config(place)) as engine:
        return [engine.submit(each).result() for each in requests or (asked(),)]


def blocks_in(place: Path) -> list[Path]:
    return sorted(place.glob(f"*/*{ENDING}"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the three blocks of a prompt, and its answer."""
    place = tmp_path_factory.mktemp("blocks")
    return place, answered(place)[0]


@pytest.fixture
def place(written, tmp_path):
    """A copy of that directory."""
    return shutil.copytree(written[0], tmp_path / "blocks")


@pytest.mark.parametrize(
    "runner", ["compiled", "general", pytest.param("slots", marks=pytest.mark.slow)]
)
def test_the_next_engine_answers_the_same_to_the_bit(runner, tmp_path, monkeypatch):
    if RUNNERS[runner] is not None:
        monkeypatch.setattr(engines, "runner_for", RUNNERS[runner])
    adapter = write_adapter(tmp_path / "plain", "llama", seed=1, rank=2)
    requests = [asked(), asked("plain")]
    starts = [
        answered(tmp_path / "blocks", *requests, library=Library({"plain": adapter}))
        for _ in range(2)
    ]
    for first, again in zip(*starts, strict=True):
        assert (first.cached_tokens, again.cached_tokens) == (0, WHOLE)
        assert first.tokens == again.tokens  # log probabilities too
    assert len(blocks_in(tmp_path / "blocks")) == 6


def test_blocks_belong_to_one_base_and_one_way_to_compute(tmp_path, monkeypatch):
    base, kernels = base_of(), []
    first = identity_of_blocks(base, object(), 16)
    assert identity_of_blocks(base_of(), object(), 16) == first
    assert identity_of_blocks(base, object(), 32) != first
    assert identity_of_blocks(base, "", 16) != first  # another runner
    with monkeypatch.context() as patched:
        patched.setattr(identity, "version", lambda name: {"transformers": "6"}.get(name, "1"))
        assert "transformers 6" in identity_of_blocks(base, object(), 16)["versions"]
    library = tmp_path / "decode-avx2.so"  # of two wheels of one version
    for content in (b"one", b"two"):
        library.write_bytes(content)
        with monkeypatch.context() as patched:
            patched.setattr(identity, "library_of", lambda _: (SimpleNamespace(_name=library), ""))
            kernels.append(identity_of_blocks(base, object(), 16)["kernels"])
    assert kernels[0] != kernels[1]
    base.model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 1  # which no sample may see
    assert identity_of_blocks(base, object(), 16) != first
    veneer.write_model(base.model, base.tokenizer, tmp_path / "base")
    in_files = Base(str(tmp_path / "base"), base.model, base.tokenizer)
    first = identity_of_blocks(in_files, object(), 16)
    assert identity_of_blocks(in_files, object(), 16) == first
    os.utime(tmp_path / "base" / "model.safetensors", (1, 1))  # as if it were written anew
    assert identity_of_blocks(in_files, object(), 16) != first


KEYS = [bytes([n]) * 32 for n in range(1, 5)]


def opened(place: Path, limit: int = 10**9, base: str = "a") -> PrefixFiles:
    return PrefixFiles(place, limit, {"base": base}, torch.device("cpu"))


def block(number: int) -> KVBlock:
    return KVBlock(torch.full((2, 40), float(number)), torch.arange(30).bfloat16())


def keep(files: PrefixFiles, *keys: bytes) -> PrefixFiles:
    """Write a prompt's blocks, and close."""
    for key in keys:
        files.keep(key, block(key[0]))
    files.use(keys)
    files.close()
    return files


def read(files: PrefixFiles, *keys: bytes) -> dict[bytes, Any]:
    files.fetch(keys, 10**9)
    blocks: dict[bytes, Any] = {}
    while files.is_reading(keys):
        files.wait(60)
        blocks |= dict(files.take())
    return blocks


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)


def swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)  # whole, but another block


@pytest.mark.parametrize("damage", [cut, empty, flip, swap])
def test_a_damaged_block_is_left_out_and_written_anew(damage, tmp_path, caplog):
    keep(opened(tmp_path), *KEYS)
    paths = blocks_in(tmp_path)
    damage(paths[1], paths[3])
    files = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "veneer.serve"):
        blocks = read(files, *KEYS)
    assert list(blocks) == [KEYS[0], *KEYS[2:]]
    assert all(torch.equal(blocks[key].keys, block(key[0]).keys) for key in blocks)
    assert all(torch.equal(blocks[key].values, block(0).values) for key in blocks)
    assert caplog.text.count("is damaged") == 1
    assert str(paths[1]) in caplog.text
    assert not paths[1].exists()
    keep(files, KEYS[1])
    files = opened(tmp_path)
    assert list(read(files, *KEYS)) == KEYS
    files.close()


def test_nobody_else_reads_blocks(tmp_path):
    files = keep(opened(tmp_path), *KEYS)
    assert files.home.stat().st_mode & 0o777 == 0o700
    files.home.chmod(0o755)
    keep(opened(tmp_path))
    assert files.home.stat().st_mode & 0o777 == 0o700


def test_a_server_starts_while_another_removes_blocks(tmp_path, monkeypatch):
    keep(opened(tmp_path), *KEYS)
    listed = blocks_in(tmp_path)
    size = listed[1].stat().st_size
    listed[0].unlink()
    monkeypatch.setattr(prefix_files, "_all_blocks", lambda directory: listed)
    files = opened(tmp_path)
    assert files.nbytes == 3 * size
    assert list(read(files, *KEYS[1:])) == KEYS[1:]
    files.close()


def test_what_is_still_to_be_read_does_not_delay_the_end(tmp_path, monkeypatch):
    keep(opened(tmp_path), *KEYS)
    files, began, go_on = opened(tmp_path), Event(), Event()
    keys_read = []

    def read_slowly(key: bytes) -> None:
        keys_read.append(key)
        began.set()
        assert go_on.wait(60)

    monkeypatch.setattr(files, "_read", read_slowly)
    files.fetch(KEYS, 10**9)
    assert began.wait(60)
    files._closing = True
    go_on.set()
    files.close()
    assert keys_read == KEYS[:1]


def test_what_a_slow_disk_still_has_to_write_delays_the_end_only_so_long(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(prefix_files, "CLOSE_SECONDS", 0.0)
    begun, tried = Event(), list[bytes]()

    def write_slowly(write: Any) -> None:
        tried.append(write.key)
        begun.set()
        eventually(lambda: files._closing)

    files = opened(tmp_path)
    monkeypatch.setattr(files, "_write", write_slowly)
    for number in range(3):
        files.keep(bytes([number]) * 32, block(number))
    assert begun.wait(60)
    files.close()
    assert tried == [bytes(32)]
    assert "2 prefix blocks were not kept at the end" in caplog.text


def test_another_bases_block_is_none_of_ours(tmp_path, caplog):
    keep(opened(tmp_path, base="b"), *KEYS)
    (other,) = {path.parent for path in blocks_in(tmp_path)}
    files = opened(tmp_path)
    assert read(files, *KEYS) == {}
    files.close()
    for path in blocks_in(tmp_path):
        shutil.copy(path, files.home)
    files = opened(tmp_path)
    assert read(files, *KEYS) == {}
    files.close()
    assert caplog.text.count("of another base") == 4
    assert len(list(other.iterdir())) == 5


def test_the_limit_holds_for_all_bases_and_the_oldest_go_first(tmp_path):
    keep(opened(tmp_path, base="b"), *KEYS)
    theirs = blocks_in(tmp_path)
    size = theirs[0].stat().st_size
    for path, moment in zip(theirs, (10.0, 20.0, 4e9, 4e9), strict=True):
        os.utime(path, (moment, moment))
    home = theirs[0].parent
    foreign = [tmp_path / "letter.txt", tmp_path / "mine" / theirs[0].name, home / "note"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"y" * size)
        os.utime(path, (1.0, 1.0))
    limit = int(6.7 * size)  # two more than there are
    keep(opened(tmp_path, limit), *KEYS[:3])
    ours = [path for path in blocks_in(tmp_path) if path not in foreign]
    assert len(ours) == 6
    assert set(theirs) - set(ours) == {theirs[0]}
    files = opened(tmp_path, limit)
    assert files.nbytes == 6 * size
    files.use(KEYS[:3])  # from memory: later than anything else of ours
    keep(files, KEYS[3])
    assert not theirs[1].exists()
    files = opened(tmp_path, limit)
    files.keep(bytes(32), block(0))
    files.close()
    # Nothing of others is older, so the last block of the longer prompt goes, and not its first.
    left = {path.stem for path in blocks_in(tmp_path) if path.parent == files.home}
    assert left == {key.hex() for key in (*KEYS[:2], KEYS[3], bytes(32))}
    assert all(path.exists() for path in foreign)
    keep(opened(tmp_path, size // 2), bytes([9]) * 32)
    assert not [path for path in blocks_in(tmp_path) if path not in foreign]


def test_what_a_killed_server_left_is_removed_in_time(tmp_path):
    home = keep(opened(tmp_path), *KEYS).home
    name = f".{'d' * 64}{ENDING}."
    old, fresh = home / f"{name}old", home / f"{name}fresh"
    foreign = home / f"{'z' * 64}{ENDING}"
    for path in (old, fresh, foreign):
        path.write_bytes(b"half")
    os.utime(old, (1.0, 1.0))
    files = opened(tmp_path)
    assert list(read(files, *KEYS)) == KEYS
    files.close()
    assert not old.exists()
    assert fresh.exists()  # another server may be writing it
    assert foreign.exists()


def test_a_servers_notes_of_use_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_files, "MOST_NOTED", 3)
    keep(opened(tmp_path), *KEYS)
    path = blocks_in(tmp_path)[0]
    os.utime(path, (1.0, 1.0))
    files = opened(tmp_path)
    files.use(KEYS)
    eventually(lambda: path.stat().st_mtime, lambda changed: changed != 1.0)
    assert len(files._used) <= 3
    files.close()


def test_no_more_is_read_than_memory_takes(tmp_path):
    size = blocks_in(tmp_path)[0].stat().st_size if keep(opened(tmp_path), *KEYS) else 0
    files = opened(tmp_path)
    files.fetch(KEYS, 2 * size + 1)
    assert [files.is_reading([key]) for key in KEYS] == [True, True, False, False]
    files.close()


def test_other_rows_go_on_while_blocks_are_read(place, written, monkeypatch):
    go_on, read = Event(), PrefixFiles._read

    def read_slowly(files: PrefixFiles, key: bytes) -> Any:
        assert go_on.wait(60)
        return read(files, key)

    monkeypatch.setattr(PrefixFiles, "_read", read_slowly)
    with Engine(base_of(), config=config(place)) as engine:
        waiting = engine.submit(asked())
        other = engine.submit(asked(sampling=Sampling(max_new_tokens=3), stop=("x",)))
        short = Request(PROMPT[:9], sampling=Sampling(max_new_tokens=20))
        assert engine.submit(short).result().new_tokens == 20
        cancelled = engine.submit(asked())
        cancelled.cancel()
        assert cancelled.result().reason == "cancelled"
        go_on.set()
        answer = waiting.result()
        assert (answer.cached_tokens, answer.tokens) == (WHOLE, written[1].tokens)
        assert other.result().new_tokens == 3


def test_a_full_disk_and_a_missing_file_stop_nothing(place, written, monkeypatch, caplog):
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    with Engine(base_of(), config=config(place)) as engine:
        for path in blocks_in(place):
            path.unlink()
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "veneer.serve"):
            patched.setattr(prefix_files, "new_file", full)
            answer = engine.submit(asked()).result()
            assert (answer.cached_tokens, answer.tokens) == (0, written[1].tokens)
            engine._scheduler.prefixes.close()
    assert caplog.text.count("No space left") == 1
    assert blocks_in(place) == []


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VeneerError, match="cannot be kept in"):
        Engine(base_of(), config=config(tmp_path / "file"))
