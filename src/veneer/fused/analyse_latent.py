"""Latent attention's structure, read from one pass through a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.fused.structure import ExpansionStructure, LatentStructure
from veneer.fused.watch import Attended, Call


@dataclass(frozen=True)
class Expanded:
    """A linear layer that reads a latent, behind its norm where there is one."""

    norm: Call | None
    linear: Call

    @property
    def structure(self) -> ExpansionStructure:
        norm = None if self.norm is None else self.norm.path
        return ExpansionStructure(norm=norm, linear=self.linear.path)


@dataclass(frozen=True)
class Latents:
    """What gives q or its latent, what gives the latent of k and v, and what expands them."""

    inputs: tuple[Call, Call]
    q: Expanded | None
    kv: Expanded

    @property
    def norms(self) -> list[Call]:
        return [it.norm for it in (self.q, self.kv) if it is not None and it.norm is not None]

    def structure(self, attended: Attended) -> LatentStructure | None:
        """Return the structure, or None where the projections give other than what attention has
        read: each head's last dims turn, and k has these from one head."""
        heads, head_dim, value_dim = attended.q.shape[1], attended.q.shape[3], attended.v.shape[3]
        q = self.inputs[0] if self.q is None else self.q.linear
        turning = self.inputs[1].y.shape[-1] - self.kv.linear.x.shape[-1]
        k_and_v = heads * (head_dim - turning + value_dim)
        fits = q.y.shape[-1] == heads * head_dim and self.kv.linear.y.shape[-1] == k_and_v
        # What gives q's latent gets the latent's gradient, so it gives nothing else.
        fits &= self.q is None or q.x.shape[-1] == self.inputs[0].y.shape[-1]
        if not fits or not 0 < turning < head_dim:
            return None
        of_q = None if self.q is None else self.q.structure
        return LatentStructure(q=of_q, kv=self.kv.structure, turning=turning)


def latents_of(before: Sequence[Call], norms: Sequence[Call]) -> Latents | None:
    """Return how q, k and v come from latents, None where they do not.

    before: the linear layers that are called before attention, in their order; what expands the
    latent of k and v is the last of them.
    """
    inputs = [call for call in before if call.reads(before[0].x)]
    behind = [call for call in before if not call.reads(before[0].x)]
    if len(inputs) != 2 or len(behind) not in (1, 2):
        return None
    expanded: dict[int, Expanded] = {}  # by which of the inputs gives the latent
    for call in behind:
        norm = next((norm for norm in norms if call.reads(norm.y)), None)
        reads = call if norm is None else norm
        source = next((i for i, each in enumerate(inputs) if reads.reads(each.y)), None)
        if source is None or source in expanded:
            return None
        expanded[source] = Expanded(norm, call)
        of_kv = source
    return Latents((inputs[1 - of_kv], inputs[of_kv]), expanded.get(1 - of_kv), expanded[of_kv])
