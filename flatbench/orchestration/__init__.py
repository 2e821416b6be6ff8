"""A whole study from its first run to its last, wherever runs run."""
