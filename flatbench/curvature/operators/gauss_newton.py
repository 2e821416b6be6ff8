"""The generalised Gauss-Newton matrix of a loss over many batches, as an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.entrance import ROWS
from flatbench.curvature.operators.graphs import Before, require_second_derivatives
from flatbench.curvature.operators.loss_operator import LossOperator
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import Space
from flatbench.errors import NotApplicableError
from flatbench.labels import IGNORED, aligned, count_terms, shifts, unwrapped

#: (model, batch) -> the model's outputs, on which the criterion depends
Outputs = Callable[[nn.Module, Any], Tensor]
#: (outputs, batch) -> the batch's mean loss, or (mean loss, number of terms)
Criterion = Callable[[Tensor, Any], "Tensor | tuple[Tensor, int]"]


def logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits of a model in the manner of transformers.

    An encoder-decoder is given the labels, of which it makes what its decoder reads, unless the batch says
    that itself.
    """
    config = getattr(unwrapped(model), "config", None)
    needed = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch
    found: Tensor = model(**{key: v for key, v in batch.items() if key != "labels" or needed}).logits
    return found


def cross_entropy(outputs: Tensor, batch: Mapping[str, Tensor], shifted: bool = False) -> tuple[Tensor, int]:
    """Mean cross entropy over the labels that are terms, and their number.

    Args:
        outputs: logits ``(N, classes)`` or ``(N, T, classes)``.
        shifted: whether the logits of a token stand one place before its label, see `flatbench.labels`.
    """
    labels = batch["labels"]
    terms = count_terms(labels, shifted)
    if shifted and labels.ndim > 1:
        outputs, labels = outputs[:, :-1], aligned(labels, shifted)
    loss = nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    return loss, terms


class GaussNewtonOperator(LossOperator):
    """``G = Σ_b n_b·J_bᵀ H_b J_b / Σ_b n_b``: J the outputs' Jacobian, H the criterion's Hessian in them.

    For a convex criterion G is positive semi-definite; with cross entropy it is the Fisher information
    matrix (Martens 2020, arXiv 1412.1193). A product is a Jacobian-vector product by two backward passes,
    one with the criterion's Hessian, and a backward pass, in a graph that is kept while memory allows.

    Args:
        outputs: ``logits`` of a transformers classifier if None.
        criterion: cross entropy with the batch's ``labels`` if None, with each next token's where the model
            is one that predicts it.

    With neither, the cross entropy is compared with the model's own loss on a few rows when the operator is
    opened, and NotApplicableError raised where they differ (a regression, smoothed labels, weighted classes).

    See `LossOperator` for the other arguments; there are no products by differences.
    """

    gauss_newton = True

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs | None = None,
        criterion: Criterion | None = None,
        batches: Iterable[Any] = (),
        *,
        space: Space = "all",
        only: Callable[[str], bool] | None = None,
        memory: int | None = None,
        shorten: bool = True,
        precision: Precision = "float32",
    ) -> None:
        self._outputs = outputs or logits
        self._uses_defaults = outputs is None and criterion is None
        self._criterion = criterion or functools.partial(cross_entropy, shifted=shifts(model))
        super().__init__(
            model,
            lambda model, batch: self._criterion(self._outputs(model, batch), batch),
            batches,
            space=space,
            only=only,
            products="exact",
            memory=memory,
            shorten=shorten,
            precision=precision,
        )

    def _open(self) -> None:
        super()._open()
        if self._uses_defaults:
            try:
                self._check_criterion()
            except BaseException:
                self._close()
                raise

    def _check_criterion(self) -> None:
        """Raise NotApplicableError if the model's own loss is not the cross entropy of its logits."""
        for batch in self.batches:
            rows = cutting.to_device(planning.sample_of(batch, ROWS), self.device)
            with torch.no_grad():
                found, terms = self._evaluate(rows)
                own = getattr(self.model(**rows), "loss", None) if terms else None
            if terms and own is not None and not torch.isclose(own, found.to(own), rtol=1e-2, atol=1e-4):
                raise NotApplicableError(
                    f"the model's own loss is {float(own):.6g} on a few rows, and the cross entropy of its "
                    f"logits {float(found):.6g}: give outputs= and criterion="
                )
            if terms:
                return

    def _build(self, batch: Any, before: Before = list) -> _Linearisation | None:
        outputs: list[Tensor] = []

        def loss(model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, int]:
            outputs.append(self._outputs(model, batch))
            return self._criterion(outputs[0], batch)

        plain, self._loss = self._loss, loss
        try:
            found = self._finite(batch)
        finally:
            self._loss = plain
        if found is None:
            return None
        return _Linearisation(outputs[0], *found, [*before(), *self._parameters])

    def restricted(self, only: Callable[[str], bool]) -> Self:
        """The diagonal block of the parameters that ``only`` chooses by name, as an operator."""
        made = type(self)(
            self.model,
            self._outputs,
            self._criterion,
            self.batches,
            space=self.space,
            only=only,
            memory=self.memory,
            shorten=self._shorten,
            precision=self._precision,
        )
        made._uses_defaults = self._uses_defaults
        return made


class _Linearisation:
    """A piece's outputs with the graphs of their transposed Jacobian and of the criterion's gradient."""

    def __init__(self, outputs: Tensor, loss: Tensor, terms: int, parameters: Sequence[Tensor]) -> None:
        self.loss, self.terms, self._parameters, self._outputs = (
            float(loss.detach()),
            terms,
            parameters,
            outputs,
        )
        self.gradients: Sequence[Tensor | None] = [None] * len(parameters)
        self._pullback: Sequence[Tensor | None] = self.gradients
        if not loss.requires_grad:
            return
        self.gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        (self._slope,) = torch.autograd.grad(loss, [outputs], create_graph=True)
        self._dual = torch.zeros_like(outputs, requires_grad=True)
        self._pullback = torch.autograd.grad(
            outputs, parameters, self._dual, create_graph=True, allow_unused=True
        )
        require_second_derivatives(self._pullback)

    def product(self, vectors: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """``Jᵀ H J v``."""
        pairs = [(p, v) for p, v in zip(self._pullback, vectors, strict=True) if p is not None]
        if not pairs:
            return [None] * len(vectors)
        pulled, weights = zip(*pairs, strict=True)
        (pushed,) = torch.autograd.grad(pulled, [self._dual], weights, retain_graph=True)  # J v
        if not self._slope.requires_grad:  # the criterion is linear in the outputs
            return [None] * len(vectors)
        (bent,) = torch.autograd.grad(self._slope, [self._outputs], pushed, retain_graph=True)
        return torch.autograd.grad(
            self._outputs, self._parameters, bent, retain_graph=True, allow_unused=True
        )
