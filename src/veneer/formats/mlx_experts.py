"""Stacks of experts and routers in mlx-lm's format, which has a SwitchLinear for each projection.

Of a SwitchLinear, lora_a is (experts, rank, in) and lora_b (experts, out, rank), as here
(LoRASwitchLinear in mlx_lm/tuner/lora.py, read in 0.32.2). Its router is a linear layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from veneer.formats.stacks import as_one
from veneer.formats.state import StoredLayer

# By model_type, what mlx-lm calls the module `mlp` of a block (mlx_lm/models/).
MIXTURES = {"qwen2_moe": "mlp", "qwen3_moe": "mlp", "olmoe": "mlp", "mixtral": "block_sparse_moe"}
SWITCH = ".switch_mlp."
# The projections that a stack of ours has one after the other.
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
ROUTER = "gate"


def in_mlx(layer: StoredLayer, model_type: str) -> list[StoredLayer]:
    """Return a stack as one for each projection, a router as a linear layer, under mlx-lm's names,
    and any other layer as it is; nothing if mlx-lm's names are not known."""
    if layer.kind != "parameter":
        return [layer]
    block, _, name = layer.path.rpartition(".mlp.")
    owner = MIXTURES.get(model_type)
    projections = STACKS.get(name.removeprefix("experts."), ())
    if owner is None or not block:
        return []
    if name == f"{ROUTER}.weight":
        return [replace(layer, path=f"{block}.{owner}.{ROUTER}", kind="linear")]
    if layer.B.ndim != 3 or not projections:
        return []
    A = layer.A.expand(len(layer.B), -1, -1)  # also an A that all experts share
    return [
        replace(layer, path=f"{block}.{owner}{SWITCH}{projection}", A=A.clone(), B=B.clone())
        for projection, B in zip(projections, layer.B.chunk(len(projections), dim=1), strict=True)
    ]


def from_mlx(layers: Iterable[StoredLayer], model_type: str) -> list[StoredLayer]:
    """Return mlx-lm's projections of experts as stacks, and its routers as parameters: the inverse
    of `in_mlx`. A projection that is missing adds nothing."""
    owner = MIXTURES.get(model_type)
    ours: list[StoredLayer] = []
    stacks: dict[str, dict[str, StoredLayer]] = defaultdict(dict)
    for layer in layers:
        block, _, name = layer.path.rpartition(f".{owner}.")
        if owner is None or not block:
            ours.append(layer)
        elif name == ROUTER:
            ours.append(replace(layer, path=f"{block}.mlp.{ROUTER}.weight", kind="parameter"))
        elif SWITCH in f".{name}" and layer.A.ndim == 3 == layer.B.ndim:
            stacks[f"{block}.mlp.experts"][name.rpartition(".")[2]] = layer
        else:
            ours.append(layer)
    for path, by_projection in stacks.items():
        ours += _stacks(path, by_projection)
    return ours


def _stacks(owner: str, by_projection: Mapping[str, StoredLayer]) -> list[StoredLayer]:
    stacks = []
    for name, projections in STACKS.items():
        there = [by_projection[p] for p in projections if p in by_projection]
        if not all(_alike(there[0], layer) for layer in there):
            stacks += there  # no layers of any base, as `validate` says
        elif there:
            missing = there[0].A[:, :0], there[0].B[:, :, :0]
            factors = [
                (by_projection[p].A, by_projection[p].B) if p in by_projection else missing
                for p in projections
            ]
            stacks.append(StoredLayer(f"{owner}.{name}", *as_one(factors), "parameter"))
    return stacks


def _alike(first: StoredLayer, layer: StoredLayer) -> bool:
    """Return whether the shapes of a projection are whole, and go together with another's."""
    (experts, rank, in_), (same, out, columns) = layer.A.shape, layer.B.shape
    is_whole = experts == same and rank == columns
    return is_whole and (experts, in_, out) == (len(first.A), first.A.shape[2], first.B.shape[1])
