"""Tensors that stay in their file, and who reads ahead of their use."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.quant import mapped
from veneer.quant.int8 import Int8
from veneer.quant.mapped import ReadAhead, map_tensors

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"made": "here"})
    return tmp_path / "x.safetensors"


def test_the_same_tensors(file):
    found = map_tensors(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_they_lie_in_the_file_and_not_in_memory(tmp_path):
    save_file({"large": torch.zeros(2**24)}, tmp_path / "x.safetensors")  # 64 MB

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    if not Path("/proc/self/status").exists():
        pytest.skip("/proc is not here")
    before = anonymous()
    tensor = map_tensors(tmp_path / "x.safetensors")["large"]
    assert float(tensor.sum()) == 0
    assert anonymous() - before < 16 * 1024


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_that_is_cut_short(file, size):
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"header|ends before"):
        map_tensors(file)


@pytest.fixture
def advice(monkeypatch) -> list[tuple[int, int]]:
    """What the system is told, as (address, advice), at once and in order."""
    told: list[tuple[int, int]] = []

    class AtOnce:
        def __init__(self, *_: object) -> None: ...

        def submit(self, function, *arguments) -> None:
            function(*arguments)

    monkeypatch.setattr(mapped, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(
        mapped,
        "_advise",
        lambda tensors, what, **_: told.extend((t.data_ptr(), what) for t in tensors) or True,
    )
    return told


def test_the_next_part_is_read_in_the_direction_of_the_walk(advice):
    weights = [Int8.of(torch.randn(64, 256), torch.float32) for _ in range(4)]
    pages = [weight.codes.data_ptr() for weight in weights]
    ReadAhead([[weight] for weight in weights])

    def told(number: int) -> list[tuple[int, int]]:
        advice.clear()
        weights[number].dense()
        return [(pages.index(at), what) for at, what in advice]

    assert told(0) == [(1, mapped.POPULATE_READ)]
    assert told(0) == []
    assert told(1) == [(0, mmap.MADV_DONTNEED), (2, mapped.POPULATE_READ)]
    assert told(2) == [(1, mmap.MADV_DONTNEED), (3, mapped.POPULATE_READ)]
    assert told(3) == [(2, mmap.MADV_DONTNEED)]
    assert told(2) == [(3, mmap.MADV_DONTNEED), (1, mapped.POPULATE_READ)]
    advice.clear()
    list(weights[2].blocks())
    assert advice == []
    assert told(1) == [(2, mmap.MADV_DONTNEED), (0, mapped.POPULATE_READ)]
    # Generation walks up again and again.
    for number in (2, 3):
        told(number)
    assert told(0) == [(3, mmap.MADV_DONTNEED), (1, mapped.POPULATE_READ)]


def test_a_system_without_the_newer_advice_is_asked_the_older(monkeypatch):
    told = []
    monkeypatch.setattr(
        mapped, "_advise", lambda spans, what: told.append(what) or what == mmap.MADV_WILLNEED
    )
    mapped._populate([torch.zeros(1)])
    assert told == [mapped.POPULATE_READ, mmap.MADV_WILLNEED]


def test_advice_reaches_the_system(tmp_path):
    if not hasattr(ctypes.CDLL(None), "madvise"):
        pytest.skip("madvise is not here")
    save_file({"a": torch.zeros(2**20)}, tmp_path / "x.safetensors")
    tensors = list(map_tensors(tmp_path / "x.safetensors").values())
    assert mapped._advise(tensors, mmap.MADV_WILLNEED)
    mapped._let_go(tensors)
    assert float(tensors[0].sum()) == 0
    assert not mapped._advise(tensors, 12345)


def test_pages_that_others_share_stay(tmp_path):
    save_file({"a": torch.ones(2**16), "b": torch.ones(16)}, tmp_path / "x.safetensors")
    tensors = map_tensors(tmp_path / "x.safetensors")
    tensors["b"] += 1  # in memory alone: the file is not written to
    mapped._let_go([tensors["a"]])
    assert tensors["b"].unique().tolist() == [2.0]
    assert float(tensors["a"].sum()) == 2**16


def test_two_parts(advice):
    weights = [Int8.of(torch.randn(64, 256), torch.float32) for _ in range(2)]
    ReadAhead([[weight] for weight in weights])
    weights[0].dense()
    assert advice == [(weights[1].codes.data_ptr(), mapped.POPULATE_READ)]
    weights[1].dense()
    advice.clear()
    weights[0].dense()  # back, as in a backward pass: there is nothing below
    assert [what for _, what in advice] == [mmap.MADV_DONTNEED]
