"""Many adapters over one base, answered together."""
