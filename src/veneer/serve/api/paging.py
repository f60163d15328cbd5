"""Lists of which a client gets so many at a time, and asks for more by the last name it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Return the `limit` items behind the one called `after`, from the first where that is None or
    gone."""
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    return listed(items[start : start + limit], has_more=start + limit < len(items))


def listed(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a list as OpenAI has it."""
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
    return {"object": "list", "data": list(items), "has_more": has_more, **ends}
