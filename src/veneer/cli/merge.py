"""`veneer merge`: a plain model, with the certificate that it says what was learnt."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

import veneer
from veneer.cli.console import (
    OUTPUT,
    bytes_text,
    quieten_libraries,
    refuse_to_replace,
    show_doing,
    show_notice,
    show_saved,
)
from veneer.cli.flags import AdapterFlags, AnyAdapter, Flat, NamedModel, Switch
from veneer.cli.loading import NAME, base_of, load_adapted
from veneer.cli.tables import merge_lines, merge_table, merged_table
from veneer.data.sources import files_of
from veneer.errors import Checks, ConfigError, MergeError
from veneer.files import check_free

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    base: NamedModel,
    adapter: AnyAdapter,
    out: Annotated[
        Path | None,
        Parameter(help="Directory for the merged model; or OUT.gguf, for llama.cpp."),
    ] = None,
    /,
    *,
    loading: Annotated[AdapterFlags, Flat] = AdapterFlags(),
    gguf_type: Annotated[
        str | None,
        Parameter(
            help="Into OUT.gguf: type such as q8_0 or f16 in which to store what changed, or all "
            "matrices where BASE is no .gguf; by default each keeps its own."
        ),
    ] = None,
    probe: Annotated[
        Path | None,
        Parameter(help="Rows to compare merged and unmerged by, instead of a sample of ours."),
    ] = None,
    accept_loss: Annotated[
        Switch, Parameter(help="Write the model even where merging loses too much.")
    ] = False,
) -> None:
    """Refuse flags that would do nothing, then merge into a model directory or into a GGUF file."""
    if out is None:  # there are two: ADAPTER and OUT
        base, adapter, out = None, Path(str(base)), adapter
    base = base_of(base, [adapter])
    into_gguf = out.suffix == ".gguf"
    if into_gguf and _is_gguf(base):
        if loading.bits is not None or {loading.dtype, loading.device} != {"auto"}:
            raise ConfigError(
                "Into GGUF the base is not computed with: leave --device, --dtype and --bits."
            )
        if probe is not None or accept_loss:
            raise ConfigError("Into GGUF nothing is probed: leave --probe and --accept-loss.")
        _merge_into_gguf(base, adapter, out, loading, kind=gguf_type)
        return
    if gguf_type is not None and not into_gguf:
        raise ConfigError("--gguf-type is for the tensors of an OUT.gguf, and OUT is no .gguf.")
    checks = Checks("Nothing is merged")
    with checks.check():
        refuse_to_replace(out)
    with checks.check():
        if into_gguf:
            from veneer.formats.gguf.plain import check_plain

            check_plain(base, out, kind=gguf_type)
    with checks.check():
        if probe is not None:
            files_of(probe)
    loaded = load_adapted(base, {NAME: adapter}, loading, checks=checks, announce=True)
    show_doing("Merging")
    plain = veneer.merge(loaded.model)
    check_free(out, sum(weight.nbytes for weight in plain.parameters()))
    show_doing("Comparing the merged model with the base and its adapter")
    report = veneer.certify(loaded.model, plain, loaded.tokenizer, probe=probe)
    OUTPUT.print(merge_table(report))
    for line in (*merge_lines(report), *_sizes(loaded.model, plain)):
        OUTPUT.print(f"  {line}")
    try:
        report.check()
    except MergeError as error:
        if not accept_loss:
            raise MergeError(f"{error} Or write it as it is: --accept-loss.") from error
        show_notice(str(error), on=OUTPUT)
    show_doing(f"Writing {out}")
    if not into_gguf:
        veneer.write_model(plain, loaded.tokenizer, out)
        show_saved(out, what="merged model")
        return
    from veneer.cli.convert import write_gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as directory:
        model = Path(directory) / out.stem
        veneer.write_model(plain, loaded.tokenizer, model)
        write_gguf(model, out, gguf_type)


def _sizes(model: PreTrainedModel, plain: PreTrainedModel) -> list[str]:
    """Return what a merged model takes where its base is quantized, and it is not."""
    from veneer.adapter.report import report_quantized
    from veneer.models.fingerprint import base_parameters

    quantized = report_quantized(model)
    if quantized is None:
        return []
    size = sum(weight.nbytes for weight in base_parameters(plain).values())
    return [
        f"the weights of the merged model are dense numbers of {str(plain.dtype).split('.')[-1]}, "
        f"{bytes_text(size)}; those of the base take {bytes_text(quantized.whole_bytes)} "
        f"({quantized.kind})"
    ]


def _is_gguf(base: str) -> bool:
    from veneer.models.locate import locate

    # A name that ends so is no directory's, whether the file is there or not.
    return base.endswith(".gguf") or Path(locate(base)).suffix == ".gguf"


def _merge_into_gguf(
    base: str, adapter: Path, out: Path, loading: AdapterFlags, *, kind: str | None
) -> None:
    from veneer.formats.adapters import read
    from veneer.formats.gguf.model import kept_of, write_merged
    from veneer.formats.training import base_in
    from veneer.models.load import load_skeleton
    from veneer.models.locate import locate

    quieten_libraries()
    refuse_to_replace(out)
    source = locate(base)
    assert isinstance(source, Path)
    state = read(adapter, load_skeleton(base), allow_bin=loading.allow_bin)
    if (then := base_in(state.training)) and then.bits:
        show_notice(
            f"The adapter in {adapter} was trained over its base in {then}, and is merged into the "
            f"weights of {source.name}: its answers may differ from those that it was trained to "
            "give."
        )
    show_doing(f"Merging {adapter} into the weights of {source.name}, and writing {out}")
    tensors = write_merged(source, state, out, kind=kind, force=loading.force)
    OUTPUT.print(merged_table(tensors))
    left = f"; {kept_of(tensors):.1%} of the adapter's change is left"
    show_saved(out, what="merged model", more=left)
