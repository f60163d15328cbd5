"""What computes a step of many rows: a model with KV caches, and adapters that are ready to act."""
