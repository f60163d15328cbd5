"""The shorter commands: inspect, pretrain, quantize, generate, chat."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape

import veneer
from veneer.adapter.config import LoRA
from veneer.adapter.report import report_targets
from veneer.cli.algebra import run_inspect_adapter
from veneer.cli.console import ERRORS, OUTPUT, bytes_text, quieten_libraries
from veneer.cli.progress import RunDisplay
from veneer.cli.tables import quantized_table, target_summary, target_table
from veneer.data.rows import Message
from veneer.errors import ConfigError
from veneer.files import size_of
from veneer.formats.adapters import holds_adapter
from veneer.formats.quantized import QuantizedLayer, write_quantized
from veneer.generate.sampling import Sampling
from veneer.models.load import Base, load_skeleton, open_base
from veneer.quant.settings import Bits
from veneer.training.pretrain import pretrain


def run_inspect(model: str, lora: LoRA | None, *, picture: Path | None) -> None:
    quieten_libraries()
    if holds_adapter(Path(model)):
        if lora is not None:
            raise ConfigError(f"{model} is an adapter: flags of one that would train do nothing.")
        run_inspect_adapter(Path(model), picture=picture)
        return
    if picture is not None:
        raise ConfigError(f"--picture is of an adapter, and {model} holds none.")
    report = report_targets(load_skeleton(model), lora or LoRA())
    OUTPUT.print(target_table(report))
    OUTPUT.print(target_summary(report))
    if report.uncovered:
        OUTPUT.print(f"[yellow]note[/] {escape(report.uncovered)}", soft_wrap=True)


def run_pretrain(out: Path, *, steps: int, seed: int) -> None:
    quieten_libraries()
    with RunDisplay() as display:
        for event in pretrain(out, steps=steps, seed=seed):
            display.show(event)


def run_quantize(model: str, out: Path, *, bits: Bits, pack_head: bool) -> None:
    quieten_libraries()
    source, tokenizer, notices = open_base(model)
    for notice in notices:
        ERRORS.print(f"  [yellow]note[/] {escape(notice)}")
    layers: list[QuantizedLayer] = []
    for shard in write_quantized(
        source, tokenizer, out, bits=bits, name=model, pack_head=pack_head
    ):
        layers += shard.layers
        there = ", there already" if shard.kept else ""
        OUTPUT.print(f"  file {shard.number} of {shard.of}: {bytes_text(shard.bytes)}{there}")
    OUTPUT.print(quantized_table(layers))
    OUTPUT.print(
        f"[bold]Saved[/]   {escape(str(out))} ({bytes_text(size_of(out))})", soft_wrap=True
    )


def run_generate(
    model: str,
    prompt: str,
    adapter: Path | None,
    sampling: Sampling,
    *,
    dtype: str,
    bits: Bits | None,
    force: bool,
    allow_bin: bool,
) -> None:
    base = load_adapted(model, adapter, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin)
    _print_stream(base, [Message("user", prompt)], sampling)


def run_chat(
    model: str,
    adapter: Path | None,
    sampling: Sampling,
    *,
    dtype: str,
    bits: Bits | None,
    force: bool,
    allow_bin: bool,
) -> None:
    base = load_adapted(model, adapter, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin)
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


def load_named(
    model: str,
    adapters: Mapping[str, Path],
    *,
    dtype: str,
    bits: Bits | None,
    force: bool = False,
    allow_bin: bool = False,
) -> Base:
    """Return a base with adapters over it by name, and print what a person should know of it."""
    quieten_libraries()
    base = veneer.load_base(model, dtype=dtype, bits=bits)
    for notice in base.notices:
        ERRORS.print(f"  [yellow]note[/] {escape(notice)}")
    for name, adapter in adapters.items():
        veneer.load(
            base.model,
            adapter,
            name=name,
            tokenizer=base.tokenizer,
            force=force,
            allow_bin=allow_bin,
        )
    return base


def load_adapted(
    model: str,
    adapter: Path | None,
    *,
    dtype: str,
    bits: Bits | None,
    force: bool,
    allow_bin: bool,
) -> Base:
    adapters = {} if adapter is None else {"default": adapter}
    return load_named(model, adapters, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin)


def _print_stream(base: Base, messages: list[Message], sampling: Sampling) -> str:
    pieces = []
    for piece in veneer.stream(base.model, base.tokenizer, messages, sampling=sampling):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
