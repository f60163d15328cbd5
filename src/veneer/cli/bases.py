"""`veneer pretrain` and `veneer quantize`: bases that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

import veneer
from veneer.cli.console import OUTPUT, bytes_text, quieten_libraries, show_notice, show_saved
from veneer.cli.flags import Model, PackHead, refuse_preset
from veneer.cli.progress import RunDisplay
from veneer.cli.tables import quantized_table
from veneer.files import check_writable
from veneer.quant.settings import Bits

if TYPE_CHECKING:
    from veneer.formats.quantized import QuantizedLayer


def pretrain(
    out: Annotated[Path, Parameter(help="Directory for the model.")] = Path("dist/minigpt"),
    /,
    *,
    steps: Annotated[int, Parameter(help="Optimizer steps.")] = 1000,
    seed: Annotated[int, Parameter(help="Decides the text and the model's start.")] = 0,
) -> None:
    """Show the training as any other run."""
    check_writable(out)
    quieten_libraries()
    with RunDisplay() as display:
        for event in veneer.pretrain(out, steps=steps, seed=seed):
            display.show(event)


def quantize(
    model: Model,
    out: Annotated[Path, Parameter(help="Directory for the quantized model.")],
    /,
    *,
    bits: Annotated[Bits, Parameter(help="Bits a parameter: 4 (NF4) or 8.")] = 4,
    pack_head: PackHead = False,
    pack_embedding: Annotated[
        bool, Parameter(help="Quantize the embedding to 8 bits too; only Veneer reads that.")
    ] = False,
) -> None:
    """Show each file as it is written, then the layers' bits, sizes and errors."""
    from veneer.formats.quantized import write_quantized
    from veneer.models.load import cost_of_rounding, open_base

    refuse_preset(model)
    quieten_libraries()
    source, tokenizer, notices = open_base(model)
    for notice in notices:
        show_notice(notice)
    if cost := cost_of_rounding(model, source, bits):
        show_notice(f"{cost} veneer tune takes the base as it is published, too.")
    layers: list[QuantizedLayer] = []
    for shard in write_quantized(
        *(source, tokenizer, out),
        bits=bits,
        name=model,
        pack_head=pack_head,
        pack_embedding=pack_embedding,
    ):
        layers += shard.layers
        there = ", there already" if shard.kept else ""
        OUTPUT.print(f"  file {shard.number} of {shard.of}: {bytes_text(shard.bytes)}{there}")
    OUTPUT.print(quantized_table(layers))
    show_saved(out)
