"""What an adapter knows of its training: the mapping `AdapterState.training`.

Its keys, where they are known: data, a hash of the rows as tokens; recipe, the settings; step and
steps, after which of how many steps its weights are; base, what the base was computed in; system,
the system prompt that all conversations began with. In files
also built_in, the base's name in Veneer where they name it as the hub does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn
from transformers import PreTrainedModel

from veneer.files import read_json, write_json
from veneer.models.fingerprint import base_parameters
from veneer.models.locate import HUB_NAMES
from veneer.quant.settings import Bits, Quantization
from veneer.quant.stack import quantized_weights
from veneer.quant.weight import QuantizedLinear

# In directories of other formats. PEFT takes an unknown key of its adapter_config.json for a sign
# that it is too old, and says so.
FILE = "training.json"
BUILT_IN = "built_in"
WIDTHS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class ComputedIn:
    """What a base is computed in; bits and kind where it is quantized, and whether its head is."""

    dtype: str
    bits: Bits | None = None
    kind: str | None = None
    head: bool = False

    @property
    def quantization(self) -> Quantization | None:
        return None if self.bits is None else Quantization(self.bits, self.head)

    def __str__(self) -> str:
        if self.bits is None:
            return f"{WIDTHS[self.dtype]} bits ({self.dtype})"
        return f"{self.bits} bits ({self.kind}{', the head too' if self.head else ''})"


def computed_in(model: PreTrainedModel) -> ComputedIn:
    """Return what a model's base is computed in."""
    dtype = str(next(iter(base_parameters(model).values())).dtype).removeprefix("torch.")
    # A published base is what its blocks say; Veneer has rounded nothing.
    weights = (weight for weight in quantized_weights(model).values() if not weight.published)
    weight = next(weights, None)
    if weight is None:
        return ComputedIn(dtype)
    head = model.get_output_embeddings()
    in_head = head.modules() if isinstance(head, nn.Module) else ()
    has_quantized_head = any(isinstance(module, QuantizedLinear) for module in in_head)
    return ComputedIn(dtype, cast(Bits, weight.bits), weight.kind, has_quantized_head)


def base_in(training: Mapping[str, Any]) -> ComputedIn | None:
    """Return what the base was computed in, or None where the adapter does not know."""
    base = training.get("base")
    if not isinstance(base, dict):
        return None
    dtype, bits, kind = (base.get(name) for name in ("dtype", "bits", "kind"))
    if not isinstance(dtype, str) or dtype not in WIDTHS or bits not in (None, *get_args(Bits)):
        return None
    return ComputedIn(dtype, bits, str(kind)[:16] if bits else None, base.get("head") is True)


def system_prompt(training: Mapping[str, Any]) -> str | None:
    """Return the system prompt of all conversations, or None where there is none, or not one."""
    system = training.get("system")
    return system if isinstance(system, str) and system.strip() else None


def name_here(name: str, training: Mapping[str, Any]) -> str:
    """Return Veneer's own name of the base that an adapter's files call `name`."""
    built_in = training.get(BUILT_IN)
    is_name = isinstance(built_in, str) and HUB_NAMES.get(built_in) == name
    return str(built_in) if is_name else name


def unfinished(training: Mapping[str, Any]) -> str | None:
    """Return "step 56 of 120" where the weights are not of the run's last step, or not known to
    be; None where they are, and where their step is not known."""
    step, steps = training.get("step"), training.get("steps")
    if not isinstance(step, int) or step == steps:
        return None
    return f"step {step}" + (f" of {steps}" if isinstance(steps, int) else "")


def other_base(adapter: str, training: Mapping[str, Any], here: ComputedIn) -> str | None:
    """Say that an adapter acts on other bits than those that it was trained over, or return None
    where they are the same, or not known. adapter: what it is called, at a sentence's beginning."""
    then = base_in(training)
    if then is None or then.quantization == here.quantization:
        return None
    flag = f"bits={then.bits}{', pack_head=True' if then.head else ''}" if then.bits else "no bits"
    return (
        f"{adapter} was trained over its base in {then}, and here the base is in {here}: its "
        "answers may differ from those that it was trained to give. --bits auto (in Python, "
        f"load_base with {flag}) loads the base as it was."
    )


def as_stored(base: ComputedIn) -> dict[str, Any]:
    """Return what `base_in` reads."""
    return {name: value for name, value in asdict(base).items() if value}


def read_beside(directory: Path) -> dict[str, Any]:
    """Return what FILE in a directory says, nothing where there is none."""
    file = directory / FILE
    return read_json(file) if file.is_file() else {}


def write_beside(directory: Path, training: Mapping[str, Any]) -> None:
    """Write FILE, if anything is known."""
    if training:
        write_json(directory / FILE, dict(training))
