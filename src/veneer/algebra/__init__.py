"""Adapters as vectors: sums of them, differences, and the one that lies in a full fine-tune."""
