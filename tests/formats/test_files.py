"""Half a file is never seen, nothing of others is ever lost, and damage is always named."""

import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import veneer
from support.random_adapters import (
    logits,
    same,
    shake,
    snapshot,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import tiny
from veneer import files
from veneer.files import (
    new_directory,
    new_file,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from veneer.training import checkpoint
from veneer.training.checkpoint import Checkpoint


class Cut(Exception):
    """What breaks off the writing in these tests."""


def break_off(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    raise Cut


def tree(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


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
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == place and (self / "mark").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), new_directory(place, marker="mark") as new:
        (new / "mark").write_text("new")
    assert tree(tmp_path) == {"a/mark": b"old"}


@pytest.mark.parametrize("what", ["native", "peft", "model", "checkpoint"])
def test_what_breaks_off_in_the_middle_of_an_adapter(what, tmp_path, monkeypatch):
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)))
    plain = veneer.merge(model)

    def write() -> None:
        if what == "model":
            veneer.write_model(plain, tokenizer(), tmp_path / "a")
        elif what == "checkpoint":
            checkpoint.write(Checkpoint(1, snapshot(model), {}), tmp_path / "a", keep={})
        else:
            veneer.save(model, tmp_path / "a", format=what)

    write()
    before, calls = tree(tmp_path), 0
    sync = files._sync

    # Every time something is brought to the disk is a moment at which the power may fail.
    def cut_at(moment: int) -> Callable[[Path], None]:
        def cut(path: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Cut
            sync(path)

        return cut

    shake(model, seed=2)
    for moment in range(1, 100):
        calls = 0
        monkeypatch.setattr(files, "_sync", cut_at(moment))
        try:
            write()
            break
        except Cut:
            now = tree(tmp_path)
            # From the rename on, the new one is there as a whole.
            assert now == before or calls == moment
            assert now.keys() == before.keys()
    assert moment > 3


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(mask, tmp_path):
    old = os.umask(mask)
    try:
        veneer.save(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / "n")
        veneer.save(
            veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / "p", format="peft"
        )
        veneer.write_model(tiny("minigpt"), tokenizer(), tmp_path / "m")
        write_text(tmp_path / "x" / "y.txt", "z")
        checkpoint.write(Checkpoint(1, {"a": torch.zeros(1)}, {}), tmp_path / "c", keep={})
    finally:
        assert os.umask(old) == mask
    paths = list(tmp_path.rglob("*"))
    assert len(paths) > 10
    for path in paths:
        mode = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


@pytest.mark.parametrize("theirs", ["notes.txt", "deep/notes.txt", None])
def test_what_others_wrote_there_stays(theirs, tmp_path):
    place = tmp_path / "a"
    if theirs is None:
        place.write_text("a file of this name")
    else:
        (place / theirs).parent.mkdir(parents=True)
        (place / theirs).write_text("mine")
    before, model = tree(tmp_path), veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    for write in (
        lambda: veneer.save(model, place),
        lambda: veneer.save(model, place, format="peft"),
        lambda: veneer.write_model(tiny("llama"), tokenizer(), place),
    ):
        with pytest.raises(veneer.VeneerError, match="holds other things"):
            write()
        assert tree(tmp_path) == before
        assert list(tmp_path.iterdir()) == [place]


def test_an_empty_directory_is_taken_and_an_own_one_replaced(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"))
    (tmp_path / "a").mkdir()
    veneer.save(model, tmp_path / "a", tokenizer=tokenizer())
    assert (tmp_path / "a" / "tokenizer.json").exists()
    veneer.save(model, tmp_path / "a")
    assert sorted(tree(tmp_path)) == ["a/lora_config.json", "a/lora_weights.pt"]


def test_formats_do_not_replace_each_other(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(veneer.VeneerError, match="holds other things"):
        veneer.save(model, tmp_path / "a", format="peft")
    assert tree(tmp_path) == before


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


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    """Small adapter directories of each kind."""
    home = tmp_path_factory.mktemp("homes")
    model = shake(veneer.attach(tiny("minigpt"), veneer.LoRA(rank=1, targets="qv", layers="0")))
    veneer.save(model, home / "native")
    veneer.save(model, home / "peft", format="peft")
    model = tiny("minigpt")
    with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.LoRA(rank=1, targets="q_proj", layers="0"))
    veneer.save(model, home / "new tokens", tokenizer=tokenizer())
    return {place.name: place for place in home.iterdir()}


def spoil(data: st.DataObject, content: bytes) -> bytes:
    if data.draw(st.booleans(), label="truncate"):
        return content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    spoilt = bytearray(content)
    # The first bytes are headers and names, where a fault does more than change a number.
    at = st.integers(0, min(600, len(spoilt) - 1)) | st.integers(0, len(spoilt) - 1)
    for place, bits in data.draw(st.lists(st.tuples(at, st.integers(1, 255)), min_size=1)):
        spoilt[place] ^= bits
    return bytes(spoilt)


BASE = tiny("minigpt")
STATE = snapshot(BASE)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_adapter_loads_or_is_refused(homes, tmp_path_factory, data):
    home = homes[data.draw(st.sampled_from(sorted(homes)), label="kind")]
    place = tmp_path_factory.mktemp("damaged") / "a"
    shutil.copytree(home, place)
    file = place / data.draw(st.sampled_from(sorted(f.name for f in home.iterdir())), label="file")
    file.write_bytes(spoil(data, file.read_bytes()))
    model = tiny("minigpt")
    try:
        veneer.load(model, place)
    except veneer.VeneerError:
        assert same(snapshot(model), STATE)
        assert veneer.adapters(model) == {}
    else:
        assert torch.isfinite(logits(model)).all()
    shutil.rmtree(place.parent)


def test_a_pt_file_in_which_a_member_is_missing(homes, tmp_path):
    source = homes["native"] / "lora_weights.pt"
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
