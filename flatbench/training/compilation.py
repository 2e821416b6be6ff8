"""torch.compile for training alone: the same model is evaluated and measured as it is."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from flatbench.errors import InputError

Compile = bool | Literal["aot_eager"]


class CompiledForward:
    """The forward pass of a model, compiled; inside `active`, calls of the model go through it.

    What is compiled is the ``forward`` of the model beneath peft's wrapper. Its hooks stay outside: methods
    with two points watch the model by them, and a compiled hook would be run as it was when it was traced.
    Evaluation, curvature (a compiled pass has no second derivative) and generation are left alone.

    Args:
        model: on its device, wrapped for its precision.
        how: `flatbench.config.sections.TrainOptions.compile`.
        lengths: whether batches are of different lengths, for which one graph is made then; otherwise the
            first batch's shape is compiled for, and shapes in general only once another comes.

    Raises:
        InputError: there is no C++ compiler, which inductor needs.
    """

    def __init__(self, model: nn.Module, how: Compile, lengths: bool = True) -> None:
        base: Any = getattr(model, "get_base_model", None)
        self._model: Any = base() if callable(base) else model
        self._forward: Any = None
        if how:
            backend = "inductor" if how is True else how
            if backend == "inductor":
                check_compiler()
            # or the graphs of a process's earlier runs, of the same code, would count against torch's limit
            torch.compiler.reset()
            dynamic = True if lengths else None
            self._forward = torch.compile(self._model.forward, backend=backend, dynamic=dynamic)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model computes with the compiled pass, if there is one."""
        if self._forward is None:
            yield
            return
        own = self._model.__dict__.get("forward")
        self._model.forward = self._forward
        try:
            yield
        finally:
            if own is None:
                del self._model.forward
            else:
                self._model.forward = own


def check_compiler() -> None:
    """Raise InputError where there is no C++ compiler, which torch's inductor needs."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "cl"])):
        raise InputError(
            f"train.compile: no C++ compiler here ({named or 'g++, clang++'}), and torch's inductor needs "
            "one; install one, or leave it out"
        )
