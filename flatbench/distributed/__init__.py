"""Several processes that train one run: how they start, and what of a model each holds."""
