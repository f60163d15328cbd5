"""An adapter's tensors over one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.lowrank.formula import Factors


class Adapter(nn.Module):
    """A (rank, in) and B (out, rank) over one layer, float32 masters, with their scaling.

    Over a stack of experts, A (experts, rank, in), or (rank, in) for all of them, and B (experts,
    out, rank).
    magnitude (out,): DoRA's, the length of each row of the adapted weight; None for plain LoRA.
    bias (out,): added to B (A x) and scaled with it, as PEFT's lora_bias; None for zero.
    start: A₀ and B₀ of an adapter whose B A is not zero at the start (PiSSA and its like): it then
    adds B A − B₀ A₀, so that the base need not change.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        start: Factors | None = None,
    ) -> None:
        super().__init__()
        assert A.shape[-2] == B.shape[-1], (A.shape, B.shape)
        # Contiguous, which singular value decompositions are not: FSDP2 takes no others, and torch
        # sends their numbers to other processes in the order of the memory.
        self.lora_A = nn.Parameter(A.contiguous())  # (rank, in)
        self.lora_B = nn.Parameter(B.contiguous())  # (out, rank)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)  # (out,)
        self.lora_bias = None if bias is None else nn.Parameter(bias)  # (out,)
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None if start is None else start[0].contiguous())
        self.register_buffer("start_B", None if start is None else start[1].contiguous())
        self.scaling = scaling
        self.dropout = dropout
        self.cached_norms: tuple[object, Tensor] | None = None  # while nothing can change them

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def total_rank(self) -> int:
        """The rank of `factors()`: twice `rank` where there is a start."""
        return self.rank if self.start_A is None else 2 * self.rank

    @property
    def start(self) -> Factors | None:
        """A₀ and B₀, or None where B₀ A₀ is zero."""
        if self.start_A is None or self.start_B is None:
            return None
        return self.start_A, self.start_B

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Start A and B at these values, in place; the adapter adds nothing yet."""
        self.start_A = A.to(self.lora_A).contiguous()
        self.start_B = B.to(self.lora_B).contiguous()
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def factors(self) -> Factors:
        """Return A and B as they act, differentiably: twice the rank where there is a start.

        B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀), which is zero to the bit at the start.
        """
        A, B = self.lora_A, self.lora_B
        if self.start is None:
            return A, B
        A0, B0 = self.start
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def extra_repr(self) -> str:
        kind = "" if self.magnitude is None else ", DoRA"
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}{kind}"
