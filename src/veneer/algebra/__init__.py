"""Adapters as vectors: their sums, differences and norms, and an adapter from a full fine-tune."""
