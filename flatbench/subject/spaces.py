"""The parameter spaces in which a trained model is measured, lent out and given back untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from flatbench.curvature.operators.adapters import layers_in_use
from flatbench.curvature.operators.entrance import entered
from flatbench.curvature.operators.idle import refuse_idle_adapters
from flatbench.curvature.operators.precision import Precision, Widening, half_types, named, widening_of
from flatbench.curvature.operators.spaces import NamedSpace, adapted_weights, plain_name, weight_names
from flatbench.errors import InputError, NotApplicableError
from flatbench.subject.subject import Subject


@dataclass(frozen=True)
class Point:
    """A model in evaluation mode and those of its parameters that span a space.

    Attributes:
        model: only the spanning parameters require gradients, and none holds one.
        parameters: the spanning parameters in the model's order, by their name in ``model``, in merged spaces
            that without the adapter.
        owners: the module that holds each parameter, by the parameter's name.
        precision: what was asked for.
        widening: how a model in half precision is computed in float32; None for another.
    """

    space: NamedSpace
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    owners: dict[str, nn.Module]
    precision: Precision = "float32"
    widening: Widening | None = None

    @property
    def dimension(self) -> int:
        """Number of scalars in the space."""
        return sum(p.numel() for p in self.parameters.values())

    def describe(self) -> dict[str, Any]:
        """The result entries that say where a measurement was taken, and in which precision.

        ``stored_precision`` is there for a model in half precision, and ``copy_bytes`` where it is computed
        in float32 through a copy.
        """
        kinds = {str(p.dtype).removeprefix("torch.") for p in self.parameters.values()}
        told: dict[str, Any] = {}
        if self.widening is not None:
            told = {"stored_precision": self.widening.stored, "copy_bytes": self.widening.copies}
        elif coarse := named(half_types(self.model)):  # as stored: what is computed in, whatever moves
            told = {"stored_precision": coarse}
        return {
            "space": self.space,
            "dimension": self.dimension,
            "precision": ", ".join(sorted(kinds)),
            **told,
        }

    @contextlib.contextmanager
    def moved(self, step: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
        """Inside, the weights are at ``w + scale · step``; afterwards they hold the bits of before.

        Args:
            step: a tensor for each parameter, of its shape.
        """
        with moved(list(self.parameters.values()), step, scale):
            yield


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], step: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
    """Inside, parameters are at ``w + scale · step``; afterwards they hold the bits of before."""
    saved = [p.detach().clone() for p in parameters]  # subtracting what was added would drift
    try:
        with torch.no_grad():
            for parameter, part in zip(parameters, step, strict=True):
                parameter.add_(part, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, saved, strict=True):
                parameter.copy_(old)


@contextlib.contextmanager
def in_space(
    subject: Subject,
    space: NamedSpace,
    *,
    twice_differentiable: bool = False,
    precision: Precision = "float32",
) -> Iterator[Point]:
    """Lend the subject's model out in one space.

    On the way out, by an exception as well, the subject's model is bit for bit as it was found: parameters,
    buffers, modes, ``requires_grad``, gradients, attention; so is the random state of the CPU and the GPUs.
    In ``merged`` and ``all`` an adapter is folded into the weights for the time, with the frozen ones kept
    beside. That the loss is the same inside, and the model the same afterwards, is checked: see
    `flatbench.curvature.operators.entrance.entered`.

    Args:
        twice_differentiable: use an attention that has second derivatives (torch's fused ones have none).
        precision: ``float32``: what is stored or computed in half precision is in float32 inside, through a
            copy, so that small differences of losses can be seen; ``as_stored``: as it is.

    Raises:
        NotApplicableError: the model has no such space, or is another function in it.
        InputError: ``subject.adapted`` names a module that the model lacks.
        FlatbenchError: the merged weights are not finite, or the model was changed inside.
    """
    model = subject.model
    _check_applicable(subject, space)
    only = _names(subject) if space == "merged" else None
    chosen: Any = "adapter" if space == "adapter" else "all"
    with entered(
        model,
        chosen,
        only,
        loss=lambda batch: subject.loss(model, batch),
        batches=subject.batches,
        twice_differentiable=twice_differentiable,
        precision=precision,
    ) as parameters:
        yield Point(space, model, parameters, _owners(model, parameters), precision, widening_of(model))


def _check_applicable(subject: Subject, space: NamedSpace) -> None:
    adapted = layers_in_use(subject.model)
    if space == "adapter":
        if not adapted:
            raise NotApplicableError("the model has no adapter")
        refuse_idle_adapters(subject.model)
    if space == "merged" and not subject.adapted:
        there = f", though the model has {len(adapted)}: Subject(adapted=…)" if adapted else ""
        raise NotApplicableError(f"no adapted modules are named{there}, so the merged space is empty")
    if space != "adapter" and isinstance(subject.model, peft.PeftModel) and not adapted:
        raise NotApplicableError("the adapter is not LoRA and has no merged weights")
    wanted = _names(subject) if space == "merged" else lambda name: space == "all"
    for name, parameter in subject.model.named_parameters():
        if wanted(plain_name(name)) and not parameter.is_floating_point():
            raise NotApplicableError(
                f"{plain_name(name)} is quantized ({parameter.dtype}) and cannot be moved; measure in the "
                "space 'adapter'"
            )


def refuse_rounded_inputs(model: nn.Module) -> None:
    """Raise NotApplicableError for a model whose loss has no second derivative, in any space.

    Eight-bit layers round their inputs, and their backward pass is that of the layer without rounding. In
    four bits it is the weights alone that are rounded, once.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.int8:
            raise NotApplicableError(
                f"{plain_name(name)} is in eight bits: its layer rounds its inputs, and a loss of steps has "
                "no curvature; one with 4bit has"
            )


def _names(subject: Subject) -> Callable[[str], bool]:
    """Chooses the weights of the adapted modules. Raises InputError for a module that the model lacks."""
    adapted = adapted_weights(subject.model)
    wanted: set[str] = set()
    for module in subject.adapted:
        names = adapted.get(plain_name(module)) or weight_names(subject.model, module)
        if not names:
            raise InputError(f"adapted module '{module}': the model has no such module with a weight")
        wanted.update(names)
    return wanted.__contains__


def _owners(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Module]:
    holders = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    return {name: holders[id(parameter)] for name, parameter in parameters.items()}
