"""Adapters over a frozen model: their configs and layers, attaching, using and merging them."""
