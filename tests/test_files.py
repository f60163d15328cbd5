"""Files are written whole or not at all, and damage is always named."""

import errno
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import veneer
from support.file_trees import (
    Cut,
    assert_modes_follow_the_umask,
    on_disk_before_it_is_renamed,
    tree,
)
from veneer import files
from veneer.errors import StorageError
from veneer.files import (
    new_directory,
    new_file,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)


def break_off(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    raise Cut


def test_a_file_that_breaks_off_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.json"
    for old in (None, '{"old": 1}'):
        if old is not None:
            path.write_text(old)
        before = tree(tmp_path)
        with pytest.raises(Cut), new_file(path) as temporary:
            break_off(temporary)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tensors_that_break_off_leave_the_old_ones(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    write_tensors(path, {"a": torch.arange(3.0)})
    before = tree(tmp_path)

    def cut(*_: object) -> None:
        raise Cut

    monkeypatch.setattr(files, "_sync", cut)
    with pytest.raises(Cut):
        write_tensors(path, {"a": torch.arange(4.0)})
    monkeypatch.undo()
    assert tree(tmp_path) == before
    assert torch.equal(read_tensors(path)["a"], torch.arange(3.0))


def test_a_view_is_written_without_the_rest_of_its_memory(tmp_path):
    path, memory = tmp_path / "x.pt", torch.arange(1001, dtype=torch.uint8)
    view = memory[8:16].view(torch.float32)
    write_tensors(path, {"a": view})
    with zipfile.ZipFile(path) as archive:
        (record,) = (each for each in archive.infolist() if each.filename.endswith("data/0"))
    assert record.file_size == view.nbytes
    assert torch.equal(read_tensors(path)["a"], view)


def test_all_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    with on_disk_before_it_is_renamed(monkeypatch) as names:
        for content in ("old", "new"):
            write_text(tmp_path / "a.txt", content)
            write_json(tmp_path / "deep" / "a.json", {"a": content})
            for suffix in (".pt", ".safetensors"):
                write_tensors(tmp_path / f"a{suffix}", {"a": torch.arange(3.0)})
            with new_directory(tmp_path / "a", marker="mark") as new:
                (new / "mark").write_text(content)
                (new / "below" / "it").mkdir(parents=True)
                (new / "below" / "it" / "file").write_text(content)
    assert names == ["a.txt", "a.json", "a.pt", "a.safetensors", "a"] * 2


def test_a_directory_that_breaks_off_leaves_the_old_one(tmp_path):
    place = tmp_path / "a"
    for old in (False, True):
        if old:
            with new_directory(place, marker="mark") as new:
                (new / "mark").write_text("old")
        before = tree(tmp_path)
        with pytest.raises(Cut), new_directory(place, marker="mark") as new:
            break_off(new / "inner" / "mark")
        assert tree(tmp_path) == before
        assert list(tmp_path.iterdir()) == ([place] if old else [])


def test_a_directory_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    place = tmp_path / "a"
    with new_directory(place, marker="mark") as new:
        (new / "mark").write_text("old")
    before = tree(tmp_path)
    rename = Path.rename
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as where two names cannot be

    def fail(self: Path, target: Path) -> Path:
        if target == place and (self / "mark").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), new_directory(place, marker="mark") as new:
        (new / "mark").write_text("new")
    assert tree(tmp_path) == before


def test_modes_of_text_follow_the_umask(tmp_path):
    def write() -> None:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)  # a folder that is there keeps its mode
        write_text(tmp_path / "x" / "y.txt", "z")

    assert_modes_follow_the_umask(write, tmp_path)


# Damage.


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": NaN', "\x00", "[" * 99999])
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(veneer.AdapterError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_json_that_is_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(veneer.AdapterError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(veneer.AdapterError, match=r"y\.json"):
        read_json(tmp_path / "y.json")


def test_json_is_for_people_to_read(tmp_path):
    write_json(tmp_path / "x.json", {"naïve": [1, 2.5, None]})
    assert "naïve" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"naïve": [1, 2.5, None]}


class Trap:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "sprung"))


@pytest.mark.parametrize("old_style", [False, True])
def test_nothing_in_a_pt_file_is_executed(old_style, tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "lora_weights.pt"
    torch.save({"a": Trap(sprung)}, path, _use_new_zipfile_serialization=not old_style)
    with pytest.raises(veneer.AdapterError, match=r"lora_weights\.pt"):
        read_tensors(path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(veneer.AdapterError, match=r"lora_weights\.pt"):
        read_tensors(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    "value", [[torch.zeros(2)], torch.zeros(2), {"a": 1.0}, {1: torch.zeros(2)}, {"a": "b"}, None]
)
def test_a_pt_file_that_holds_anything_but_named_tensors(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(veneer.AdapterError, match=r"x\.pt must hold named tensors"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"PK\x03\x04", b"\xff" * 100, None])
def test_tensors_that_are_none(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(veneer.AdapterError, match=name.replace(".", r"\.")):
        read_tensors(tmp_path / name)


def test_a_pt_file_in_which_a_member_is_missing(tmp_path):
    source = tmp_path / "whole.pt"
    write_tensors(source, {name: torch.arange(3.0) for name in "abcd"})
    with zipfile.ZipFile(source) as archive:
        members = archive.namelist()
        values = [name for name in members if name.endswith("data.pkl") or "/data/" in name]
        assert len(values) > 2
        for missing in values:
            path = tmp_path / "x.pt"
            with zipfile.ZipFile(path, "w") as cut:
                for member in members:
                    if member != missing:
                        cut.writestr(member, archive.read(member))
            with pytest.raises(veneer.AdapterError, match=r"x\.pt"):
                read_tensors(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_shapes_alone(tmp_path, name):
    write_tensors(tmp_path / name, {"a": torch.full((2, 3), torch.nan, dtype=torch.bfloat16)})
    a = read_tensors(tmp_path / name, shapes_only=True)["a"]
    assert (a.device.type, a.shape, a.dtype) == ("meta", (2, 3), torch.bfloat16)


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({"a": torch.empty(2, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(veneer.AdapterError, match="tensors without values"):
        read_tensors(tmp_path / "a.pt")


def test_the_size_of_a_directory_passes_over_what_goes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept").write_bytes(b"four")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # as it was a moment ago
    assert files.size_of(tmp_path) == 4
    assert files.size_of(tmp_path / "in" / "kept") == 4


def test_a_directory_that_cannot_be_removed_is_named_whole(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error", "state.json")  # as rmtree's own do

    (tmp_path / "step-4").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", fails)
    with pytest.raises(StorageError, match="step-4 cannot be written") as failed:
        files.remove_directory(tmp_path / "step-4")
    assert str(tmp_path) in str(failed.value)
