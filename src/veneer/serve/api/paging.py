"""Lists of which a client gets so many at a time, and asks for more by the last name it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.errors import RequestError


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Return the `limit` items behind the one called `after`, from the first where that is None.

    Raises RequestError where no item is called so: from the first again, a client might never end.
    """
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        why = f"after: nothing in this list is called {after[:80]!r}; leave it out for the first."
        raise RequestError(why, param="after")
    start = 0 if after is None else ids.index(after) + 1
    return listed(items[start : start + limit], has_more=start + limit < len(items))


def listed(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a list as OpenAI has it."""
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
    return {"object": "list", "data": list(items), "has_more": has_more, **ends}
