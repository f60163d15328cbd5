"""What an adapter can hold besides A and B, and which formats have a place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, listed
from veneer.formats.names import FormatName
from veneer.formats.state import LAYER_KEYS, AdapterState

Content = Literal[
    "new tokens",
    "biases of its own (lora_bias)",
    "windows of convolutions",
    "stacks of experts",
    "modules to save or biases that replace the base's",
    "rows of single tokens",
    "DoRA's magnitudes",
    "an invocation from which on alone it acts",
]
PRESENT: dict[Content, Callable[[AdapterState], bool]] = {
    "new tokens": lambda s: s.new_tokens is not None,
    "biases of its own (lora_bias)": lambda s: any(layer.bias is not None for layer in s.layers()),
    "windows of convolutions": lambda s: any(layer.A.ndim == 4 for layer in s.layers()),
    "stacks of experts": lambda s: any(layer.kind == "parameter" for layer in s.layers()),
    "modules to save or biases that replace the base's": lambda s: bool(s.modules_to_save),
    "rows of single tokens": lambda s: bool(s.trained_tokens),
    "DoRA's magnitudes": lambda s: isinstance(s.config, LoRA) and s.config.dora,
    "an invocation from which on alone it acts": lambda s: has_invocation(s),
}
Place = FormatName | Literal["merged GGUF", "serving"]
# If B A did not start at zero, all formats but ours get a plain LoRA of twice the rank
# (fold.without_start). PEFT gets new tokens as trained ones, if the base has rows for them.
PLACES: dict[Place, frozenset[Content]] = {
    "native": frozenset(PRESENT),
    "peft": frozenset(PRESENT),
    "mlx": frozenset({"DoRA's magnitudes", "stacks of experts"}),
    "loralib": frozenset(),
    "gguf": frozenset({"stacks of experts", "an invocation from which on alone it acts"}),
    "merged GGUF": frozenset({"new tokens", "DoRA's magnitudes", "stacks of experts"}),
    # What can differ from row to row. Of modules to save, embedding, head and biases of layers.
    "serving": frozenset(PRESENT) - frozenset({"windows of convolutions"}),
}


def without_place(state: AdapterState, place: Place) -> list[str]:
    """Return what a LoRA holds and `place` cannot hold, as text."""
    contents = [c for c, holds in PRESENT.items() if c not in PLACES[place] and holds(state)]
    return [*contents, *(k for k in state.tensors if k.rpartition(".")[2] not in LAYER_KEYS)]


def refuse_without_place(state: AdapterState, format: FormatName) -> None:
    """Raise AdapterError that names all contents that `format` has no place for."""
    config = state.config
    if not isinstance(config, LoRA):
        raise AdapterError(
            f"The format {format} has no place for {config.method}; write it natively."
        )
    if contents := without_place(state, format):
        others = "" if has_invocation(state) else "merge the adapter, or "
        raise AdapterError(
            f"The format {format} has no place for {listed(contents)}; {others}write it natively."
        )


def has_invocation(state: AdapterState) -> bool:
    """Return whether an adapter acts from an invocation on, and not on all tokens."""
    return isinstance(state.config, LoRA) and bool(state.config.invocation)


def acts_from(state: AdapterState) -> str:
    """Return in words from where on an adapter with an invocation acts, "" for any other."""
    if not has_invocation(state):
        return ""
    assert isinstance(state.config, LoRA)
    tokens = ", ".join(map(str, state.config.invocation_tokens))
    return f"from the last occurrence of the tokens {tokens} on"
