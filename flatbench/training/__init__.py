"""The training loop, its batches, its optimizer, and compilation."""
