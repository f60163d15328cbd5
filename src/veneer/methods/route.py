"""The one route that all adapted layers of a model share."""

from __future__ import annotations

from torch import nn

from veneer.lowrank.adapter import Route


def route_of(model: nn.Module) -> Route:
    """Return the model's route, which is made when it is first asked for."""
    route = getattr(model, "veneer_route", None)
    if route is None:
        route = Route()
        model.veneer_route = route  # type: ignore[assignment]
    return route
