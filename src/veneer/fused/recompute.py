"""What the backward pass of a training step computes again. Imports no torch."""

from __future__ import annotations

from typing import Literal

# Nothing; the outputs of each layer's projections; or whole layers.
Recompute = Literal["none", "selective", "full"]
