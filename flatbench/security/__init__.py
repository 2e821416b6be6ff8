"""Limits on what a study file can reach: paths, code, secrets."""
