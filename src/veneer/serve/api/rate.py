"""How many requests a key may make in a minute."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict

MOST_CALLERS = 10_000  # that are remembered; of more, whoever asked longest ago begins anew


class Rates:
    """A bucket for each caller, which holds the requests of a minute and fills up evenly.

    tokens(now) = min(n, tokens(then) + n · (now - then) / 60), and a request takes one
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def wait_of(self, caller: str, now: float | None = None) -> int:
        """Take a request of a caller into account; return 0 where it may be made now, and else the
        whole seconds until one may. now: in seconds, of any clock that only goes on"""
        now = time.monotonic() if now is None else now
        name = hashlib.sha256(caller.encode("utf-8", "surrogateescape")).digest()
        rate = self.per_minute / 60
        tokens, then = self._buckets.pop(name, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + rate * (now - then))
        may = tokens >= 1
        self._buckets[name] = (tokens - may, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if may else math.ceil((1 - tokens) / rate)
