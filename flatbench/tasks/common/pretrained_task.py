"""Pretrained models of tasks: configuration, tokenizer, what is adapted and what is new."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.base import Task


class PretrainedTask(Task):
    """A task on a pretrained model: the part that depends on neither data nor loss.

    A task says in `_load` how its model is loaded. Configuration, tokenizer and the names of modules are
    found when they are first asked for, and once.

    Attributes:
        model: the ``model:`` section.
    """

    model: PretrainedModel
    #: whether it reads texts, and so needs a tokenizer
    takes_text: ClassVar[bool] = True
    #: (model, what was found in its files) -> modules to train in full: what the files lack; with a new head,
    #: `pretrained.new_modules`
    _new_modules: ClassVar[Callable[[nn.Module, dict[str, Any]], tuple[str, ...]]] = (
        pretrained.missing_modules
    )

    @abstractmethod
    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The model, and what `pretrained.load` tells of its files."""

    @functools.cached_property
    def _config(self) -> Any:
        return pretrained.config(self.model)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return pretrained.tokenizer(self.model)

    @functools.cached_property
    def target_modules(self) -> Sequence[str]:  # type: ignore[override]
        """What peft adapts in this type of model. Raises InputError where peft knows none."""
        return pretrained.target_modules(self._config)

    @functools.cached_property
    def modules_to_save(self) -> Sequence[str]:  # type: ignore[override]
        """The new head where the task has one, and whatever else the pretrained files lack."""
        return type(self)._new_modules(*self._load(0))

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model, with the task's new head where it has one."""
        model, info = self._load(seed)
        # told now, because another look would load the model again
        self.__dict__.setdefault("modules_to_save", type(self)._new_modules(model, info))
        return model
