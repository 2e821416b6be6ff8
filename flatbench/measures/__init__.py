"""Measures of a finished run: one file a measure."""

from __future__ import annotations

from flatbench.config.registry import Registry

#: the measures by the names that a study file knows them by
REGISTRY = Registry(
    "measure",
    {
        "hessian": "flatbench.measures.hessian:Hessian",
        "sam_sharpness": "flatbench.measures.sam_sharpness:SAMSharpness",
        "spectrum": "flatbench.measures.spectrum:Spectrum",
        "sharpness": "flatbench.measures.sharpness:Sharpness",
        "critical_sharpness": "flatbench.measures.critical_sharpness:CriticalSharpness",
        "relative_critical_sharpness": "flatbench.measures.relative_sharpness:RelativeCriticalSharpness",
        "slice": "flatbench.measures.slice:Slice",
        "balancedness": "flatbench.measures.balancedness:Balancedness",
        "ema_gap": "flatbench.measures.ema_gap:EMAGap",
        "interference": "flatbench.measures.interference:Interference",
        "cost": "flatbench.measures.cost:Cost",
    },
    group="flatbench.measures",
)
