"""Tensors that stay in their file, and are read ahead of their use."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.quant import mapped
from veneer.quant.int8 import Int8
from veneer.quant.mapped import ReadAhead, map_tensors
from veneer.quant.stack import QuantizedStack

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
    mapped_tensors = map_tensors(file)
    assert mapped_tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert mapped_tensors[name].dtype == tensor.dtype
        assert torch.equal(mapped_tensors[name], tensor)


def test_mapped_tensors_take_no_memory(tmp_path):
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
    """Calls of madvise as (address, advice), made at once and in order."""
    calls: list[tuple[int, int]] = []

    class AtOnce:
        def __init__(self, *_: object) -> None: ...

        def submit(self, function, *arguments) -> None:
            function(*arguments)

    monkeypatch.setattr(mapped, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(
        mapped,
        "_advise",
        lambda tensors, what, **_: calls.extend((t.data_ptr(), what) for t in tensors) or True,
    )
    return calls


def test_the_next_group_is_read_in_the_direction_of_the_walk(advice):
    weights = [Int8.quantize(torch.randn(64, 256), torch.float32) for _ in range(4)]
    pages = [weight.codes.data_ptr() for weight in weights]
    ReadAhead([[weight] for weight in weights])

    def advice_on_use(number: int) -> list[tuple[int, int]]:
        advice.clear()
        weights[number].dequantize()
        return [(pages.index(at), what) for at, what in advice]

    assert advice_on_use(0) == [(1, mapped.POPULATE_READ)]
    assert advice_on_use(0) == []
    assert advice_on_use(1) == [(0, mmap.MADV_DONTNEED), (2, mapped.POPULATE_READ)]
    assert advice_on_use(2) == [(1, mmap.MADV_DONTNEED), (3, mapped.POPULATE_READ)]
    assert advice_on_use(3) == [(2, mmap.MADV_DONTNEED)]
    assert advice_on_use(2) == [(3, mmap.MADV_DONTNEED), (1, mapped.POPULATE_READ)]
    advice.clear()
    list(weights[2].blocks())
    assert advice == []
    assert advice_on_use(1) == [(2, mmap.MADV_DONTNEED), (0, mapped.POPULATE_READ)]
    # Generation is one forward pass after another.
    for number in (2, 3):
        advice_on_use(number)
    assert advice_on_use(0) == [(3, mmap.MADV_DONTNEED), (1, mapped.POPULATE_READ)]


def test_experts_are_read_in_the_order_of_their_use_when_the_router_has_chosen_them(advice):
    def stack() -> QuantizedStack:
        weights = torch.randn(4, 64, 256)
        return QuantizedStack([Int8.quantize(weight, torch.float32) for weight in weights])

    up, down = stack(), stack()
    pages = {
        expert.codes.data_ptr(): (name, e)
        for name, one in (("up", up), ("down", down))
        for e, expert in enumerate(one.experts)
    }
    ReadAhead([], [up, down])
    assert advice == []

    def read() -> list[tuple[str, int]]:
        assert all(what == mapped.POPULATE_READ for _, what in advice)  # and nothing is unmapped
        reads = [pages[at] for at, _ in advice]
        advice.clear()
        return reads

    for e in (2, 0):
        up.note_routed([e])
        down.note_routed([e])
    assert read() == [("up", 2), ("down", 2), ("up", 0), ("down", 0)]
    down.note_routed([3, 0])
    assert read() == [("down", 3), ("down", 0)]


def test_an_older_kernel_gets_the_older_advice(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mapped, "_advise", lambda _, what: calls.append(what) or what == mmap.MADV_WILLNEED
    )
    mapped.populate([torch.zeros(1)])
    assert calls == [mapped.POPULATE_READ, mmap.MADV_WILLNEED]


def test_advice_reaches_the_system(tmp_path):
    if not hasattr(ctypes.CDLL(None), "madvise"):
        pytest.skip("madvise is not here")
    save_file({"a": torch.zeros(2**20)}, tmp_path / "x.safetensors")
    tensors = list(map_tensors(tmp_path / "x.safetensors").values())
    assert mapped._advise(tensors, mmap.MADV_WILLNEED)
    mapped.release(tensors)
    assert float(tensors[0].sum()) == 0
    assert not mapped._advise(tensors, 12345)


def test_pages_that_tensors_share_stay_mapped(tmp_path):
    save_file({"a": torch.ones(2**16), "b": torch.ones(16)}, tmp_path / "x.safetensors")
    tensors = map_tensors(tmp_path / "x.safetensors")
    tensors["b"] += 1  # in memory alone: the file is not written to
    mapped.release([tensors["a"]])
    assert tensors["b"].unique().tolist() == [2.0]
    assert float(tensors["a"].sum()) == 2**16


def test_two_groups(advice):
    weights = [Int8.quantize(torch.randn(64, 256), torch.float32) for _ in range(2)]
    ReadAhead([[weight] for weight in weights])
    weights[0].dequantize()
    assert advice == [(weights[1].codes.data_ptr(), mapped.POPULATE_READ)]
    weights[1].dequantize()
    advice.clear()
    weights[0].dequantize()  # one back, as in a backward pass: there is nothing below
    assert [what for _, what in advice] == [mmap.MADV_DONTNEED]


def test_tensors_of_eight_bits_and_tensors_that_are_not_aligned(tmp_path):
    eight = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu}
    tensors = {
        name: torch.arange(9, dtype=torch.uint8).view(dtype) for name, dtype in eight.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for name, tensor in map_tensors(tmp_path / "x.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    numbers = torch.tensor([1.5, -2.0]).numpy().tobytes()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    assert (8 + len(header)) % 4
    assert map_tensors(file)["a"].tolist() == [1.5, -2.0]
