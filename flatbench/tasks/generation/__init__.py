"""Tasks whose answers are generated texts."""
