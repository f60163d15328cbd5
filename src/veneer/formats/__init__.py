"""Adapters as values; reads and writes adapters, quantized bases and merged models."""
