"""Shared parts of task families."""
