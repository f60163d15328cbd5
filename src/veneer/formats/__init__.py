"""Adapters as values, and their files. Only this room reads and writes adapters, quantized bases
and merged models."""
