"""Settings for what people train adapters for: data that is made here, settings, a score."""
