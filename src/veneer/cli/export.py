"""`veneer export`: the adapter of a run or of a checkpoint, at any time of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from veneer.cli.console import OUTPUT, quieten_libraries, refuse_to_replace, show_notice, show_saved
from veneer.cli.flags import Switch
from veneer.errors import ConfigError, ModelError
from veneer.formats.names import FormatName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from veneer.formats.state import AdapterState


def export(
    run: Annotated[Path, Parameter(help="Directory of a run, or of one of its checkpoints.")],
    out: Annotated[
        Path | None,
        Parameter(
            help="Where the adapter goes; by default to the run's own, such as lora_adapter."
        ),
    ] = None,
    /,
    *,
    step: Annotated[
        int | None, Parameter(help="Take the checkpoint of this step, not the newest.")
    ] = None,
    best: Annotated[
        Switch, Parameter(help="Take the weights of the best evaluation, not the last ones.")
    ] = False,
    format: Annotated[FormatName, Parameter(help="Format to write.")] = "native",
) -> None:
    """Say which weights are written."""
    from veneer.formats import checkpoint
    from veneer.formats.adapters import read, write
    from veneer.formats.locate import locate, pick
    from veneer.formats.native import method_of
    from veneer.run_directory import RunDirectory

    quieten_libraries()
    if step is not None and best:
        raise ConfigError("--step and --best exclude each other.")
    if step is not None or (best and not checkpoint.detects(run)):
        place = pick(run, step=step)
    else:
        place = locate(run).path
    state = checkpoint.read(place, best=True) if best else read(place)
    if out is None:
        out = RunDirectory(run).adapter(method_of(state))
    refuse_to_replace(out)
    tokenizer = _tokenizer_of(state) if format == "native" else None
    for note in write(state, out, format=format, tokenizer=tokenizer):
        show_notice(note, on=OUTPUT)
    show_saved(out, facts=[format], more=f"; from {place}{', the best weights' if best else ''}")


def _tokenizer_of(state: AdapterState) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a run stores with its adapter, or None, with a notice, where the
    base is not here."""
    from veneer.adapter.new_tokens import extend_tokenizer
    from veneer.models.load import load_config_and_tokenizer

    try:
        _, tokenizer = load_config_and_tokenizer(state.base_name)
    except ModelError as error:
        show_notice(f"It is written without tokenizer.json: {error}", on=OUTPUT)
        return None
    if state.new_tokens is not None:
        extend_tokenizer(tokenizer, state.new_tokens.tokens)
    return tokenizer
