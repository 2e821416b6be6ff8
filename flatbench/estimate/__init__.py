"""Estimated cost of a study, before anything is run."""
