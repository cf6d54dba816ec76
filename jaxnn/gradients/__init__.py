"""Whether a gradient is right."""
