"""Where runs run. An executor takes paths of run directories and calls `runs.finish` on each, somewhere."""

from __future__ import annotations

from flatbench.config.registry import Registry

REGISTRY = Registry(
    "executor",
    {
        "local": "flatbench.executors.local:Local",
        "slurm": "flatbench.executors.slurm:Slurm",
        "ray": "flatbench.executors.ray:Ray",
    },
    group="flatbench.executors",
)
