"""Notebook interface: checkpoints, results, and their display."""
