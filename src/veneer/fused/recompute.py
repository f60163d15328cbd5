"""What the backward pass of a training step computes again, or reads. Imports no torch."""

from __future__ import annotations

from typing import Literal

# Nothing; the outputs of each layer's projections; whole layers; or nothing, where what is kept for
# it is on the disk.
Recompute = Literal["none", "selective", "full", "disk"]
