"""What computes: requests as values, rows, the model's runners and the caches. Knows no HTTP."""
