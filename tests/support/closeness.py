"""How near a result has to be: judged by a wider reference and the peer's own error, never by a
constant that suits one processor."""

from torch import Tensor


def assert_no_further(ours: Tensor, theirs: Tensor, reference: Tensor, what: str = "it") -> None:
    """Assert that ours is no further from a float64 reference than the peer's is, times 2, plus
    1e-6 of the reference's own length (law 3)."""
    assert ours.shape == theirs.shape == reference.shape, what
    wide = reference.double()
    own, peer = ((one.double() - wide).norm().item() for one in (ours, theirs))
    limit = 2 * peer + 1e-6 * wide.norm().item()
    assert own <= limit, f"{what}: {own:.3g} from the reference, where the peer is {peer:.3g}"
