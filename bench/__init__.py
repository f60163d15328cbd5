"""Measurements against peers, runnable by anyone: one file a question."""
