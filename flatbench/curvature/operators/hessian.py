"""The Hessian of a loss over many batches, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.graphs import Before, require_second_derivatives
from flatbench.curvature.operators.loss_operator import Loss, LossOperator
from flatbench.curvature.operators.losses import transformers_loss
from flatbench.curvature.operators.planned import Products
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import Space


class HessianOperator(LossOperator):
    """``H = ∇²L`` of the exact mean loss over all batches, at the weights as they are.

    A product is a backward pass through the graph of the gradient (Pearlmutter 1994); the graph is kept from
    one product to the next while the memory allows, else built again, piece by piece.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(2, 1, bias=False)
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
    >>> hessian = HessianOperator(model, loss, [batch])
    >>> (hessian @ torch.tensor([1.0, 1.0])).tolist()
    [1.0, 4.0]

    See `LossOperator` for the arguments; without ``loss``, that of a transformers model is used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        batches: Iterable[Any] = (),
        *,
        space: Space = "all",
        only: Callable[[str], bool] | None = None,
        products: Products = "auto",
        memory: int | None = None,
        shorten: bool = True,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            model,
            loss or transformers_loss,
            batches,
            space=space,
            only=only,
            products=products,
            memory=memory,
            shorten=shorten,
            precision=precision,
        )

    def _build(self, batch: Any, before: Before = list) -> _Gradient | None:
        found = self._finite(batch)
        return None if found is None else _Gradient(*found, [*before(), *self._parameters])

    def restricted(self, only: Callable[[str], bool]) -> Self:
        """The diagonal block of the parameters that ``only`` chooses by name, as an operator."""
        return type(self)(
            self.model,
            self._loss,
            self.batches,
            space=self.space,
            only=only,
            products=self._products,
            memory=self.memory,
            shorten=self._shorten,
            precision=self._precision,
        )


class _Gradient:
    """A piece's gradient with its graph."""

    def __init__(self, loss: Tensor, terms: int, parameters: Sequence[Tensor]) -> None:
        self.loss, self.terms, self._parameters = float(loss.detach()), terms, parameters
        self.gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            self.gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        require_second_derivatives(self.gradients)

    def product(self, vectors: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """``Σ_j ∂(g_j · v_j)/∂w``."""
        pairs = [(g, v) for g, v in zip(self.gradients, vectors, strict=True) if g is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return [None] * len(vectors)
        outputs, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, self._parameters, weights, retain_graph=keep, allow_unused=True)
