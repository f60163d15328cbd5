"""Flags that several commands take, each described once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from veneer.errors import ModelError
from veneer.models.device_names import DEVICE
from veneer.plan.near_presets import near_presets
from veneer.plan.presets import PRESETS
from veneer.quant.settings import LoadBits, Offload
from veneer.training.recipe import DType

# For a frozen dataclass: each field is a flag, and the text below the field is its help.
Flat = Parameter(name="*")


def _flat(heading: str) -> Parameter:
    """Return `Flat` for flags that --help shows below a heading, in the order of these calls."""
    return Parameter(name="*", group=Group.create_ordered(heading))


SearchFlags = _flat("Search")
MethodFlags = _flat("What trains")
LoRAFlags = _flat("Low-rank adapters")
TrainFlags = _flat("Training")
ObjectiveFlags = _flat("Objective")
OnPolicyFlags = _flat("Samples and rewards (grpo, rloo, distill --on-policy)")
RowFlags = _flat("Rows")
Loaded = _flat("Base")
# For a bool: there is no --no-... of it.
Switch = Annotated[bool, Parameter(negative="")]
AsJson = Annotated[
    bool,
    Parameter(
        name="--json",
        negative="",
        help="Print what happens as JSON for programs, one object a line; words go to standard "
        "error.",
    ),
]

Model = Annotated[
    str, Parameter(help="Built-in name, local directory, .gguf file, or hub name of the base.")
]
NamedModel = Annotated[
    str | None,
    Parameter(help="The base, as for tune; may be left out where the adapter names it."),
]
AnyAdapter = Annotated[
    Path,
    Parameter(
        help="Adapter of any format: a directory, a .gguf file, a .pt file of loralib; or a run's "
        "directory, or a checkpoint in it."
    ),
]
System = Annotated[
    str | None,
    Parameter(
        help="System prompt; by default the one that the adapter was trained with, '' for none."
    ),
]
Device = Annotated[
    str,
    Parameter(
        help=f"Device to compute on: {DEVICE.text}; auto takes an accelerator where there is one."
    ),
]
AdapterFormat = Annotated[Literal["native", "peft"], Parameter(help="Format of the adapter.")]
AllowBin = Annotated[
    Switch, Parameter(help="Read PEFT's adapter_model.bin too, and nothing but its tensors.")
]
PackHead = Annotated[bool, Parameter(help="With --bits, quantize the head too.")]
OffloadBase = Annotated[
    Offload,
    Parameter(
        help="Where the frozen base is while it is not used: none, on the device; cpu, in this "
        "machine's memory; disk, in its files. Blocks are copied to the device ahead of their "
        "use, so that a base larger than its memory trains."
    ),
]
Picture = Annotated[
    Path | None, Parameter(help="Draw it too, as a heat map of blocks and kinds of layers.")
]
WITH_WEIGHTS = ("minigpt", "smollm2-135m")  # of the presets


def refuse_preset(model: str) -> None:
    """Raise ModelError for a preset that has no weights, or for a name like that of one, where
    weights are needed."""
    if model in WITH_WEIGHTS or "/" in model or model.endswith(".gguf") or Path(model).exists():
        return
    if model in PRESETS:
        what = "is a preset"
    else:
        near = [name for name in near_presets(model) if name not in WITH_WEIGHTS]
        if not near:
            return
        what = f"is no model here. Did you mean {' or '.join(map(repr, near))}? These are presets"
    raise ModelError(
        f"{model!r} {what} of veneer plan and veneer inspect: shapes without weights. "
        "Name a directory, a .gguf file or a hub name (owner/model)."
    )


@dataclass(frozen=True)
class BaseFlags:
    """How a base is loaded."""

    device: Device = "auto"
    dtype: DType = "auto"
    """Number format to compute in; auto takes the faster one here."""
    bits: LoadBits | Literal["auto"] | None = None
    """Quantize the base's linear layers: 4 bits (NF4) or 8 a parameter; 16: dense, where a .gguf
    file's own blocks would stay; or auto, the bits that the adapter was trained over."""


@dataclass(frozen=True)
class AdapterFlags(BaseFlags):
    """How a base and an adapter over it are loaded."""

    force: Switch = False
    """Use the adapter over this base even if it was made on another."""
    allow_bin: AllowBin = False
