"""Graph of the loss over one piece of the data, and which operations can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

#: how torch says that an operation has no second derivative
_SECOND_DERIVATIVE_ERRORS = (
    "derivative for", "once_differentiable", "double backward", "Double backward", "twice",
)  # fmt: skip


class Graph(Protocol):
    """One piece's loss with what a product needs."""

    loss: float
    terms: int
    gradients: Sequence[Tensor | None]

    def product(self, vectors: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """Product with the piece's matrix, a tensor per parameter; ``keep`` for further products."""


#: variables before the parameters in which derivatives are taken; asked for when the loss has been computed
Before = Callable[[], list[Tensor]]


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Whether torch complains about an operation that can be differentiated only once."""
    return any(text in str(error) for text in _SECOND_DERIVATIVE_ERRORS)


def depends_on(tensor: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether a tensor's graph reaches one of these leaves.

    Requiring a gradient does not say so: peft's and transformers' hooks have the embeddings of a model whose
    embeddings are frozen require one (``enable_input_require_grads``).
    """
    leaves = {id(parameter) for parameter in parameters}
    if id(tensor) in leaves:
        return True
    return any(id(getattr(node, "variable", None)) in leaves for node in _nodes([tensor]))


def _nodes(tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """The nodes of the tensors' graph, each once."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def require_second_derivatives(gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError if an operation in the gradients' graph can be differentiated only once.

    torch raises that itself only where a backward pass runs through the operation; asked for the derivatives
    of some parameters, it leaves the operation out, and the product would be silently wrong.
    """
    if any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
        raise RuntimeError("an operation in the model was marked once_differentiable")
