"""Frozen weights in 8 or 4 bits a number, which are dequantized for each use."""
