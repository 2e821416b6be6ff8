"""Tasks: one file a family (data, model, loss, metric)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatbench.config.registry import Options, Registry

if TYPE_CHECKING:
    from flatbench.tasks.base import Task

#: the tasks by the names that a study file knows them by
REGISTRY = Registry(
    "task",
    {
        "digits": "flatbench.tasks.images.digits:Digits",
        "glue": "flatbench.tasks.text.glue:Glue",
        "prompt_classification": "flatbench.tasks.text.prompt_classification:PromptClassification",
        "text_classification": "flatbench.tasks.text.text_classification:TextClassification",
        "image_classification": "flatbench.tasks.images.image_classification:ImageClassification",
        "clip_classification": "flatbench.tasks.images.clip_classification:ClipClassification",
        "causal_lm": "flatbench.tasks.generation.causal_lm:CausalLM",
        "vqa": "flatbench.tasks.vqa.vqa:VQA",
    },
    group="flatbench.tasks",
)


def model_options(name: str) -> type[Options]:
    """The pydantic model of the ``model:`` section for the task called ``name``."""
    annotation: Any = REGISTRY.options(name).model_fields["model"].annotation
    options: type[Options] = annotation
    return options


def load(task: Mapping[str, Any], model: Mapping[str, Any]) -> Task:
    """A task from the resolved ``task:`` and ``model:`` sections of a study or run.

    Raises InputError where the task finds its options unusable.
    """
    options = dict(task)
    name = options.pop("name")
    checked = REGISTRY.options(name).model_validate({**options, "model": model})
    loaded: Task = REGISTRY.load(name)(**{key: getattr(checked, key) for key in type(checked).model_fields})
    return loaded
