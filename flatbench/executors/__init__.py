"""Executors: take paths of run directories and call `runs.finish` on each, here or elsewhere."""

from __future__ import annotations

from flatbench.config.registry import Registry

#: the executors by the names that a study file knows them by
REGISTRY = Registry(
    "executor",
    {
        "local": "flatbench.executors.local:Local",
        "slurm": "flatbench.executors.slurm:Slurm",
        "ray": "flatbench.executors.ray:Ray",
    },
    group="flatbench.executors",
)
