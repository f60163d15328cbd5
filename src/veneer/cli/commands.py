"""The shorter commands: inspect, pretrain, merge, generate, chat."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

import veneer
from veneer.cli.console import ERRORS, OUTPUT, bytes_text, quieten_libraries
from veneer.cli.progress import RunDisplay
from veneer.cli.tables import merged_table, packed_table, target_summary, target_table
from veneer.data.rows import Message
from veneer.errors import VeneerError
from veneer.generate.sampling import Sampling
from veneer.lowrank.config import LoRA
from veneer.methods.merge import rounded_away
from veneer.methods.report import report_targets
from veneer.models.load import Base, load_skeleton, open_base
from veneer.models.locate import locate
from veneer.plan.config import PackedBits
from veneer.store.adapters import read as read_adapter
from veneer.store.gguf_model import kept_of, write_merged
from veneer.store.packed import PackedLayer, write_packed
from veneer.training.pretrain import pretrain
from veneer.training.tune import size_of


def run_inspect(model: str, lora: LoRA) -> None:
    quieten_libraries()
    report = report_targets(load_skeleton(model), lora)
    OUTPUT.print(target_table(report))
    OUTPUT.print(target_summary(report))


def run_pretrain(out: Path, *, steps: int, seed: int) -> None:
    quieten_libraries()
    with RunDisplay() as display:
        for event in pretrain(out, steps=steps, seed=seed):
            display.show(event)


def run_quantize(model: str, out: Path, *, bits: PackedBits, pack_head: bool) -> None:
    quieten_libraries()
    source, tokenizer, notices = open_base(model)
    for notice in notices:
        ERRORS.print(f"  [yellow]note[/] {escape(notice)}")
    layers: list[PackedLayer] = []
    for shard in write_packed(source, tokenizer, out, bits=bits, name=model, pack_head=pack_head):
        layers += shard.layers
        there = ", there already" if shard.kept else ""
        OUTPUT.print(f"  file {shard.number} of {shard.of}: {bytes_text(shard.bytes)}{there}")
    OUTPUT.print(packed_table(layers))
    OUTPUT.print(
        f"[bold]Saved[/]   {escape(str(out))} ({bytes_text(size_of(out))})", soft_wrap=True
    )


def run_merge(
    base: str, adapter: Path, out: Path, *, dtype: str, bits: PackedBits | None, force: bool
) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise VeneerError(f"{out} holds something already; name another place.")
    loaded = _load(base, adapter, dtype=dtype, bits=bits, force=force)
    plain = veneer.merge(loaded.model)
    veneer.write_model(plain, loaded.tokenizer, out)
    lost = rounded_away(loaded.model, plain)
    OUTPUT.print(
        f"Merged model: {escape(str(out))} ({bytes_text(size_of(out))}); "
        f"rounding to {plain.dtype} took {lost:.2%} of the adapter's change"
    )


def run_merge_gguf(base: str, adapter: Path, out: Path, *, kind: str | None, force: bool) -> None:
    quieten_libraries()
    if out.exists():
        raise VeneerError(f"{out} is there already; name another place.")
    place = locate(base)
    if not isinstance(place, Path) or place.suffix != ".gguf":
        raise VeneerError(f"{out} can be made of a .gguf base only, and {base} is none.")
    state = read_adapter(adapter)
    stored = write_merged(place, state, out, kind=kind, force=force)
    OUTPUT.print(merged_table(stored))
    OUTPUT.print(
        f"Merged model: {escape(str(out))} ({bytes_text(out.stat().st_size)}); "
        f"{kept_of(stored):.1%} of the adapter's change is left",
        soft_wrap=True,
    )


def run_generate(
    model: str,
    prompt: str,
    adapter: Path | None,
    sampling: Sampling,
    *,
    dtype: str,
    bits: PackedBits | None,
    force: bool,
) -> None:
    base = _load(model, adapter, dtype=dtype, bits=bits, force=force)
    _print_stream(base, [Message("user", prompt)], sampling)


def run_chat(
    model: str,
    adapter: Path | None,
    sampling: Sampling,
    *,
    dtype: str,
    bits: PackedBits | None,
    force: bool,
) -> None:
    base = _load(model, adapter, dtype=dtype, bits=bits, force=force)
    messages: list[Message] = []
    while True:
        try:
            question = OUTPUT.input("[bold]You:[/] ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        messages.append(Message("user", question))
        messages.append(Message("assistant", _print_stream(base, messages, sampling)))


def _load(
    model: str, adapter: Path | None, *, dtype: str, bits: PackedBits | None, force: bool
) -> Base:
    quieten_libraries()
    base = veneer.load_base(model, dtype=dtype, bits=bits)
    for notice in base.notices:
        ERRORS.print(f"  [yellow]note[/] {escape(notice)}")
    if adapter is not None:
        veneer.load(base.model, adapter, tokenizer=base.tokenizer, force=force)
    return base


def _print_stream(base: Base, messages: list[Message], sampling: Sampling) -> str:
    pieces = []
    for piece in veneer.stream(base.model, base.tokenizer, messages, sampling=sampling):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
