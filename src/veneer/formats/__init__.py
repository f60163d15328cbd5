"""The only room that reads and writes adapters, checkpoints and merged models."""
