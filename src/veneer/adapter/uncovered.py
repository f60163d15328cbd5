"""What `all` and `mlp` do not reach: matrices in the adapted blocks that are no layers."""

from __future__ import annotations

from torch import nn

from veneer.adapter.config import LoRA
from veneer.adapter.targets import describe_base, resolve

WHOLE = {"all", "mlp"}  # targets that promise every linear layer of a kind


def uncovered(model: nn.Module, config: LoRA) -> str | None:
    """Return which matrices of the adapted blocks stay as they are though a person who asks for
    `all` or `mlp` may think otherwise, or None: experts that are one parameter, routers, Mamba's
    convolutions. Raises TargetError for targets that match nothing.
    """
    if not WHOLE.intersection(config.targets):
        return None
    layers = describe_base(model).layers
    blocks = {layer.block for layer in resolve(model, config, layers)} - {None}
    in_blocks = [layer for layer in layers if layer.block in blocks and layer.parameters]
    missing = [x for x in in_blocks if len(x.stored) > 1 and not x.is_adaptable]
    if not missing:
        return None
    share = sum(x.parameters for x in missing) / sum(x.parameters for x in in_blocks)
    names = sorted({layer.inner_path for layer in missing})
    return (
        f"Adapters lie over linear layers and embeddings; of the adapted blocks' weights "
        f"{share:.1%} are neither and stay as they are: {', '.join(names)}."
    )
