"""Headers of GGUF files that promise what is not there are refused before anybody believes them."""

import struct
import time
from pathlib import Path

import gguf
import pytest

from support import spoilt_files
from veneer.errors import ModelError
from veneer.models.gguf_header import check_header
from veneer.models.locate import locate

TYPES = gguf.GGUFValueType


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + numbers + struct.pack("<IQ", kind, offset)


def header(pairs: list[bytes], tensors: list[bytes], *, data: int = 0, version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(pairs))
    whole = b"GGUF" + counts + b"".join(pairs) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32 + data)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


ARRAY, U32, F32, STRING = int(TYPES.ARRAY), int(TYPES.UINT32), int(TYPES.FLOAT32), int(TYPES.STRING)
WIDTH = pair("llama.embedding_length", U32, struct.pack("<I", 8))
GOOD = [WIDTH, pair("general.name", STRING, text("x")), pair("a", ARRAY, array(F32, 3, bytes(12)))]
WRONG = {
    "an array of 2⁶⁰ numbers": header([pair("a", ARRAY, array(F32, 2**60))], []),
    "an array of 2⁶⁰ texts": header([pair("a", ARRAY, array(STRING, 2**60))], []),
    "arrays within an array": header([pair("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1)))], []),
    "a text of 2⁶³ bytes": header([pair("a", STRING, struct.pack("<Q", 2**63))], []),
    "an unknown kind": header([pair("a", 77, bytes(8))], []),
    "a key twice": header([WIDTH, WIDTH], []),
    "a key that is no text": header([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)], []),
    "2⁶⁰ pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(100),
    "2⁶⁰ tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(100),
    "a tensor twice": header([], [tensor("t", (8,), 0), tensor("t", (8,), 32)], data=64),
    "a tensor of no kind": header([], [tensor("t", (8,), 0, kind=99)], data=32),
    "2³¹ dimensions": header([], [text("t") + struct.pack("<I", 2**31) + bytes(64)], data=32),
    "five dimensions": header([], [tensor("t", (1, 1, 1, 1, 8), 0)], data=32),
    "a shape of 2¹²⁰": header([], [tensor("t", (2**60, 2**60), 0)], data=32),
    "half a block": header([], [tensor("t", (8,), 0, kind=8)], data=32),
    "tensors that overlap": header([], [tensor("s", (8,), 0), tensor("t", (8,), 0)], data=64),
    "a tensor that lies apart": header([], [tensor("s", (8,), 0), tensor("t", (8,), 64)], data=96),
    "a tensor beyond the end": header([], [tensor("t", (16,), 0)], data=32),
    "an alignment of 3": header([pair("general.alignment", U32, struct.pack("<I", 3))], []),
    "a width that no tensor has": header([WIDTH], [tensor("t", (4,), 0)], data=32),
    "more blocks than tensors": header(
        [pair("llama.block_count", U32, struct.pack("<I", 2**31))], [tensor("t", (8,), 0)], data=32
    ),
    "nothing": b"",
    "another file": b"PK\x03\x04" + bytes(100),
}


def test_a_good_header(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(GOOD, [tensor("t", (8, 2), 0), tensor("s", (8,), 64)], data=96))
    check_header(path)
    assert {t.name for t in gguf.GGUFReader(path).tensors} == {"t", "s"}
    big = struct.pack(">IQQ", 3, 0, 0)
    path.write_bytes(b"GGUF" + big)
    check_header(path)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_header_that_promises_what_is_not_there(wrong, tmp_path):
    path, start = tmp_path / "x.gguf", time.process_time()
    path.write_bytes(WRONG[wrong])
    with pytest.raises(ModelError, match=r"x\.gguf cannot be read as a GGUF"):
        check_header(path)
    assert time.process_time() - start < 1


def test_each_state_of_a_file_is_looked_at(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(GOOD, [tensor("t", (8,), 0)], data=32))
    check_header(path)
    path.write_bytes(WRONG["a key twice"])
    with pytest.raises(ModelError):
        check_header(path)
    with pytest.raises(ModelError):
        check_header(tmp_path / "none.gguf")


def test_what_gguf_writes_and_what_people_use_is_right(tmp_path):
    spoilt_files.write_gguf(tmp_path / "good")
    check_header(tmp_path / "good" / "model.gguf")
    try:
        packaged = locate("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    check_header(Path(packaged))
