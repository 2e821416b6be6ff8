"""What is learned: one file a family (data, model, loss, metric)."""

from __future__ import annotations

from flatbench.registry import Registry

REGISTRY = Registry(
    "task",
    {
        "digits": "flatbench.tasks.digits:Digits",
        "glue": "flatbench.tasks.glue:Glue",
    },
    group="flatbench.tasks",
)
