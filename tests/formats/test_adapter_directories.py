"""Directories of adapters and models are written whole, never over others' files, and checked."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import veneer
from support.file_trees import (
    assert_modes_follow_the_umask,
    assert_whole_wherever_it_is_cut,
    on_disk_before_it_is_renamed,
    tree,
)
from support.random_adapters import logits, same, shake, snapshot, tokenizer, with_new_tokens
from support.tiny_models import tiny
from veneer.formats.table import FORMATS


@pytest.mark.parametrize("what", ["native", "peft", "model"])
def test_writing_that_breaks_off_leaves_a_whole_directory(what, tmp_path, monkeypatch):
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)))
    plain = veneer.merge(model)

    def write() -> None:
        if what == "model":
            veneer.write_model(plain, tokenizer(), tmp_path / "a")
        else:
            veneer.save(model, tmp_path / "a", format=what)

    assert_whole_wherever_it_is_cut(write, lambda: shake(model, seed=2), tmp_path, monkeypatch)


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"native", "peft"}))
def test_each_format_is_on_the_disk_before_it_takes_its_place(format, tmp_path, monkeypatch):
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="qv")))
    with on_disk_before_it_is_renamed(monkeypatch):
        veneer.save(model, tmp_path / "a", format=format)


def test_modes_follow_the_umask(tmp_path):
    model, plain = veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tiny("minigpt")

    def write() -> None:
        veneer.save(model, tmp_path / "n")
        veneer.save(model, tmp_path / "p", format="peft")
        veneer.write_model(plain, tokenizer(), tmp_path / "m")

    assert_modes_follow_the_umask(write, tmp_path)


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
    assert sorted(tree(tmp_path)) == ["a/SHA256SUMS", "a/lora_config.json", "a/lora_weights.pt"]


def test_formats_do_not_replace_each_other(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(veneer.VeneerError, match="holds other things"):
        veneer.save(model, tmp_path / "a", format="peft")
    assert tree(tmp_path) == before


# Damage.


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
