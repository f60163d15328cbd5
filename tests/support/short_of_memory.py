"""`veneer`, each of whose processes has a byte less than it would need with the whole base.

A program, which processes that it starts read anew.
"""

from typing import Any

from veneer.cli import main
from veneer.plan.plan import Plan
from veneer.training import planned_processes

_share_out = planned_processes.share_out


def _short(plan: Plan, count: int, memory: int | None, **options: Any) -> Any:
    return _share_out(plan, count, plan.memory.peak - 1, **options)


planned_processes.share_out = _short

if __name__ == "__main__":
    main()
