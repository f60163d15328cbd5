"""How near a result has to be: judged by a wider reference and the peer's own error, never by a
constant that suits one processor."""

import copy
from collections.abc import Callable, Mapping

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
    assert ours.shape == theirs.shape == reference.shape, what
    wide = reference.double()
    own, peer = ((one.double() - wide).norm().item() for one in (ours, theirs))
    limit = 2 * peer + slack * max(wide.norm().item(), least)
    assert own <= limit, f"{what}: {own:.3g} from the reference, where the peer is {peer:.3g}"


def assert_gradients_no_further(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """Assert it of each gradient. One that cancels to nothing, as that of a bias of the keys does
    before a softmax, is judged by a thousandth of the longest."""
    assert ours.keys() == theirs.keys() == reference.keys() != set()
    least = max(gradient.norm().item() for gradient in reference.values()) / 1000
    for name, gradient in reference.items():
        assert_no_further(ours[name], theirs[name], gradient, name, least=least)


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
