"""Cost of a study's measures, in gradients and passes forward of single examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatbench import measures
from flatbench.measures.cost import PAIRS
from flatbench.measures.sampling import FORWARD, PRODUCT

#: examples that a measure takes which the study does not tell: as many as its sampling error asks for
USUAL = 256
#: products with the Hessian until the largest eigenvalue is found, more for each further one, and for errors
_PRODUCTS, _FURTHER, _ERRORS = 15, 5, 16


def gradients(measure: Mapping[str, Any], train: int) -> float | None:
    """Gradients of single examples that one measurement costs; a third of one for each pass forward.

    Args:
        measure: its options by name, and ``name``.
        train: examples of the training split.

    Returns:
        None for a measure that is not known.
    """
    loaded: Any = measures.REGISTRY.load(measure["name"])
    name = measure["name"]
    examples = min(measure.get("examples") or USUAL, train)
    counted: dict[str, Any] = {
        "hessian": lambda m: (
            (min(m["max_iterations"], _PRODUCTS + _FURTHER * (m["k"] - 1)) + _ERRORS) * PRODUCT
        ),
        "sam_sharpness": lambda m: m["steps"] + 2,
        "sharpness": lambda m: (
            len(m["rho"])
            * (m["restarts"] * (m["steps"] + 1) if m["kind"] == "worst" else m["samples"] / FORWARD)
        ),
        "slice": lambda m: m["points"] * m["directions"] / FORWARD,
        "spectrum": lambda m: m["max_products"] * PRODUCT,
        "balancedness": lambda m: 0,
        # two gradients, and a pass forward for each of eight perturbations
        "interference": lambda m: 2 + 8 / FORWARD,
        "cost": lambda m: 8 / max(examples, 1) + (m.get("pairs") or PAIRS) * 2 * bool(m.get("paired")),
    }
    if name not in counted:
        # a measure of somebody else may say it itself
        own = getattr(loaded, "gradients", None)
        return None if own is None else float(own(measure, train))
    return float(counted[name](measure)) * examples


def times(measure: Mapping[str, Any], epochs: float) -> int:
    """How often a final run takes it: during training too where it says ``every``."""
    every = measure.get("every")
    return 1 + (int(epochs) // every if every else 0)
