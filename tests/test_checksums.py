"""What is written as a directory has the checksums of its files, and damage is told from them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import veneer
from support.file_trees import tree
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer import files
from veneer.checksums import SUMS, problems_of, read_sums, unlisted
from veneer.errors import AdapterError, StorageError
from veneer.files import new_directory, remove_directory, remove_leftovers, write_json


@pytest.fixture
def place(tmp_path) -> Path:
    with new_directory(tmp_path / "a", marker="mark") as new:
        (new / "mark").write_text("x")
        (new / "in").mkdir()
        (new / "in" / "b c").write_bytes(b"\x00\xff" * 500)
    return tmp_path / "a"


def test_all_files_are_listed_as_sha256sum_has_them(place):
    assert sorted(read_sums(place)) == ["in/b c", "mark"]
    assert problems_of(place) == {}
    assert unlisted(place) == []
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "--check", "--strict", SUMS], cwd=place, check=True)


def test_any_flipped_bit_is_seen(place):
    file = place / "in" / "b c"
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 997):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert list(problems_of(place)) == ["in/b c"]
    file.unlink()
    (place / "new").write_text("")
    assert problems_of(place) == {"in/b c": "missing"}
    assert unlisted(place) == ["new"]
    for line in ("no checksum", f"{'0' * 64}  ../b", f"{'0' * 64}  /etc/hostname"):
        (place / SUMS).write_text(f"{line}\n")
        with pytest.raises(AdapterError, match="SHA256SUMS is damaged"):
            problems_of(place)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_an_adapter_with_a_flipped_bit_is_not_loaded(format, tmp_path):
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)))
    veneer.save(model, tmp_path / "a", format=format)
    (file,) = (f for f in (tmp_path / "a").iterdir() if f.suffix in (".pt", ".safetensors"))
    data = bytearray(file.read_bytes())
    numbers = next(iter(model.state_dict()[k] for k in model.state_dict() if "lora_B" in k))
    start = data.find(numbers.numpy().tobytes()[:16])
    assert start > 0
    data[start] ^= 1  # the lowest bit of a number, which is a number still
    file.write_bytes(data)
    with pytest.raises(AdapterError, match=f"{file.name} is not as it was written") as caught:
        veneer.load(tiny("llama"), tmp_path / "a")
    assert f"if you changed it on purpose, remove {tmp_path / 'a' / SUMS}" in str(caught.value)
    (tmp_path / "a" / SUMS).unlink()
    veneer.load(tiny("llama"), tmp_path / "a")


def test_settings_may_be_changed_by_hand(tmp_path):
    veneer.save(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / "a")
    file = tmp_path / "a" / "lora_config.json"
    write_json(file, files.read_json(file) | {"alpha": 7})
    veneer.load(tiny("llama"), tmp_path / "a")


# What is killed while it writes.

KILLED = """
import os, sys
from pathlib import Path
from veneer import files

def killed(path):
    os._exit(9)

files._sync = killed
place = Path(sys.argv[1])
if sys.argv[2] == "file":
    files.write_text(place, "new")
else:
    if sys.argv[2] == "without exchange":
        files._exchange = lambda *_: False
        rename = Path.rename
        files._sync = lambda path: None
        Path.rename = lambda self, to: os._exit(9) if to == place else rename(self, to)
    with files.new_directory(place, marker="mark") as new:
        (new / "mark").write_text("new")
"""


@pytest.mark.parametrize("how", ["file", "exchange", "without exchange"])
def test_what_a_killed_process_left_is_removed(how, tmp_path):
    place = tmp_path / "a[1]"  # a name that is no pattern
    if how == "file":
        place.write_text("old")
    else:
        with new_directory(place, marker="mark") as new:
            (new / "mark").write_text("old")
    before = tree(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(place), how], check=False)
    assert killed.returncode == 9
    assert tree(tmp_path) != before
    with files.new_file(tmp_path / "other") as temporary:
        remove_leftovers(tmp_path, "a[1]")
        remove_leftovers(tmp_path)  # all, but for what is being written
        assert temporary.exists()
    (tmp_path / "other").unlink()
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [place]


def test_what_only_looks_like_a_leftover_stays(place):
    for name in (".a.old-backup of mine", ".a.partial-x"):
        (place.parent / name).mkdir()
    before = sorted(place.parent.iterdir())
    remove_leftovers(place.parent, "a")
    remove_leftovers(place.parent)
    assert sorted(place.parent.iterdir()) == before


def test_a_directory_is_removed_at_one_moment(place, monkeypatch):
    def killed(path: Path) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(InterruptedError):
            remove_directory(place)
    assert not place.exists()
    remove_leftovers(place.parent)
    assert tree(place.parent) == {}


# A full disk.

FULL = {
    "ours": OSError(28, "No space left on device"),
    "quota": OSError(122, "Disk quota exceeded"),
    "safetensors": RuntimeError("I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"),
    "numpy": OSError("96 requested and 0 written"),
    "device": OSError(5, "Input/output error"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_one_line(error, tmp_path):
    def write() -> None:
        with new_directory(tmp_path / "a", marker="x") as new, files.new_file(new / "x") as file:
            file.write_text("half")
            raise error

    with pytest.raises(StorageError) as caught:
        write()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a'} cannot be written: the disk")
    assert "\n" not in message
    assert caught.value.exit_code == 75
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_has_no_place_for_is_not_begun(tmp_path):
    files.check_free(tmp_path / "not" / "here", 1)
    with pytest.raises(StorageError, match=r"takes [\d,]+ MB, but the disk has .* Nothing was"):
        files.check_free(tmp_path, 2**62)


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), files.new_file(tmp_path / "a"):
        raise ZeroDivisionError
