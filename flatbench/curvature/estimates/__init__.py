"""Stochastic estimates of an operator's trace, diagonal and spectral density."""
