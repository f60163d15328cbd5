"""Bases: which one a name means, its skeleton and description, and its weights from any file."""
