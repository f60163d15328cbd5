"""Frozen weights that are kept small, and unpacked for each use."""
