"""Bases: finding one by name, its skeleton and description, and its weights from any file."""
