"""How near a result has to be: judged by a wider reference and the peer's own error, never by a
constant that suits one processor."""

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean

from torch import Tensor, nn


def assert_no_further(
    ours: Tensor,
    theirs: Tensor,
    reference: Tensor,
    what: str = "it",
    *,
    slack: float = 1e-6,
    least: float = 0.0,
) -> None:
    """Assert that ours is no further from a float64 reference than the peer's is, times 2, plus
    `slack` of the reference's own length, or of `least` where that is more (law 3)."""
    own, peer, length = _distances(ours, theirs, reference, what)
    limit = 2 * peer + slack * max(length, least)
    assert own <= limit, f"{what}: {own:.3g} from the reference, where the peer is {peer:.3g}"


def _distances(
    ours: Tensor, theirs: Tensor, reference: Tensor, what: str
) -> tuple[float, float, float]:
    """Return how far ours and the peer's are from a reference, and its length."""
    assert ours.shape == theirs.shape == reference.shape, what
    wide = reference.double()
    own, peer = ((one.double() - wide).norm().item() for one in (ours, theirs))
    return own, peer, wide.norm().item()


def assert_gradients_no_further(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """Assert it of each gradient. One that cancels to nothing, as that of a bias of the keys does
    before a softmax, is judged by a thousandth of the longest."""
    least = _least(ours, theirs, reference)
    for name, gradient in reference.items():
        assert_no_further(ours[name], theirs[name], gradient, name, least=least)


def assert_gradients_no_further_as_a_rule(draws: Sequence[Sequence[Mapping[str, Tensor]]]) -> None:
    """Assert it of each gradient in the geometric mean over several draws of weights, each of them
    ours, the peer's and the reference, and of every draw within ten times that. All gradients of a
    draw come from the same few rounded states, near the reference by chance or far: one draw says
    little."""
    leasts = [_least(*each) for each in draws]
    for name in draws[0][2]:
        ratios = []
        for each, least in zip(draws, leasts, strict=True):
            own, peer, length = _distances(*(gradients[name] for gradients in each), name)
            slack = 1e-6 * max(length, least)
            ratios.append(max(own, slack) / (2 * peer + slack))
        assert geometric_mean(ratios) <= 1, f"{name}: {ratios} times as far as it may be"
        assert max(ratios) <= 10, f"{name}: {ratios} times as far as it may be"


def _least(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> float:
    """Return the least length by which a gradient is judged."""
    assert ours.keys() == theirs.keys() == reference.keys() != set()
    return max(gradient.norm().item() for gradient in reference.values()) / 1000


def assert_same_logits(
    others: Tensor, model: nn.Module, logits: Callable[[nn.Module], Tensor]
) -> None:
    """Assert that the logits of another program, or of another form of the model, are the model's:
    no further from those in float64 than the model's own are (law 3)."""
    wide = copy.deepcopy(model)
    if any(name.endswith("experts") for name, _ in wide.named_modules()):
        wide.set_experts_implementation("eager")  # float64 has no grouped products
    assert_no_further(others, logits(model), logits(wide.double()), "logits")


def assert_as_near(ours: Tensor, theirs: Tensor, reference: Tensor, what: str = "it") -> None:
    """Assert that ours is no further than the peer's, where the reference is our own in float64:
    then the peer's has to be near it too, but for its own rounding."""
    assert_no_further(ours, theirs, reference, what)
    assert_no_further(theirs, ours, reference, what, slack=1e-5)
