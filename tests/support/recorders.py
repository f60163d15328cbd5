"""What plays the part of a CUDA graph where there is no card."""

from collections.abc import Callable

from veneer.kernels.graphs import Tensors


class StandIn:
    """Records by keeping the function, which a replay calls again, writing over the results.

    wrong: what a replay adds to them.
    """

    def __init__(self, *, wrong: float = 0.0) -> None:
        self.recorded = self.replayed = 0
        self.wrong = wrong

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        self.recorded += 1
        results = function()

        def replay() -> None:
            self.replayed += 1
            for name, value in function().items():
                results[name].copy_(value + self.wrong)

        return replay, results
