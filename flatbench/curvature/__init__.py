"""Hessian operators and what is computed from them; imports torch and nothing of flatbench."""
