"""Methods side by side: the same rows, the same budget, each in a process of its own."""
