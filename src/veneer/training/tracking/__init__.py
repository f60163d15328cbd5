"""A run's numbers for programs that draw and keep them: events in, a tracker out."""
