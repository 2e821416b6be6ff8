"""Bi-LoRA (Liu et al. 2025, arXiv 2508.19564)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.models.factors import LoRAFactors, lora_factors, refuse_attention
from flatbench.optim.base import RadiusOptions
from flatbench.optim.base.buffers import Buffers, average_over_processes, norm, usable
from flatbench.optim.base.two_points import TwoPoints
from flatbench.seeding import derive_seed


@dataclass(kw_only=True, eq=False, repr=False)
class BiLoRA(RadiusOptions, TwoPoints):
    """Bi-LoRA: a second adapter on every layer climbs while the first one descends; one gradient a step.

    In training every adapted layer computes ``W0 + s·B·A + B2·A2``. One backward pass gives the gradients of
    both adapters. The base optimizer steps down the first's and, in a parameter group of its own without
    weight decay, up those of B2 and A2. Then, if ``c = sqrt(Σ ‖B2·A2‖²)`` over all layers exceeds rho, B2 and
    A2 are each scaled by ``sqrt(rho/c)`` (arXiv 2508.19564). Whether the second adapter has the first's
    scaling s is left open there; here it has none, so that rho bounds the perturbation of W itself.

    B2 and A2 belong to the optimizer: they are part of its state, and the model never saves them. Make
    learning rate schedulers after it, so that they know the group. With several processes the gradients of
    B2 and A2 are averaged, so that the perturbation is a global one. See
    `flatbench.optim.base.two_points.TwoPoints` for when it is there.

    Args:
        base_optimizer: makes the update.
        model: a model with LoRA layers that train.
        rho: bound of the perturbation of all adapted weights together.
        r: rank of the second adapter; that of the first if not given.
        ascent_lr: initial learning rate of the second adapter, which schedulers change like any; the base
            optimizer's if not given.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        seed: of A2's initial values; a study takes a stream of the run's seed.

    Raises:
        InputError: no LoRA layer trains, or a layer is of a kind that has no second adapter here.
        ValueError: rho is negative, r below 1, or the schedule lacks ``total_steps``.
    """

    needs_adapter: ClassVar[bool] = True

    r: Annotated[int, Field(ge=1)] | None = None
    ascent_lr: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if self.r is not None and self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")
        factors = lora_factors(self.model)
        if not factors:
            raise InputError("bi_lora adds to LoRA's layers, and no LoRA layer of the model trains")
        refuse_attention("bi_lora", self.model)
        super().__post_init__(base_optimizer)
        generator = torch.Generator().manual_seed(derive_seed(self.seed or 0, "second adapter"))
        # one a layer, however many adapters the layer has
        seconds = [
            _SecondAdapter(next(group), self.r, generator) for _, group in groupby(factors, lambda f: f.name)
        ]
        grouped = groupby(sorted(seconds, key=_SecondAdapter.key), _SecondAdapter.key)
        self._groups = [list(group) for _, group in grouped]
        self._seconds = [second for group in self._groups for second in group]
        self._parameters = [p for second in self._seconds for p in (second.A, second.B)]
        self._negate = "maximize" not in base_optimizer.defaults
        lr = self.ascent_lr or base_optimizer.param_groups[0]["lr"]
        self.add_param_group({"params": self._parameters, "lr": lr, "weight_decay": 0.0, "maximize": True})
        self._buffers: Buffers | None = None

    @property
    def layout(self) -> Buffers:
        """The second adapter, laid end to end."""
        if self._buffers is None or not self._buffers.fits(self._parameters):
            self._buffers = Buffers(self._parameters)
        return self._buffers

    def moved_parameters(self) -> list[Tensor]:
        """Parameters of the layers whose outputs differ between the two points."""
        own: list[Tensor] = [factors.A for factors in lora_factors(self.model)]
        return own + (super().moved_parameters() if self.modes.exist else [])

    def before_pass(self) -> None:
        """Whoever clears the model's gradients alone means those of the second adapter too."""
        if torch._C._current_graph_task_id() == -1 and all(
            f.A.grad is None and f.B.grad is None for second in self._seconds for f in (second.factors,)
        ):
            self._clear()

    def _move_away(self) -> None:
        if not self.away:
            for second in self._seconds:
                second.follow()
                second.active = True
            self.away = True

    def _move_back(self) -> None:
        for second in self._seconds:
            second.active = False
        self.away = False

    def _gradients_of(self, closure: Callable[[], Any]) -> Any:
        earlier = [parameter.grad for parameter in self._parameters]
        self._clear()  # the closure may clear the model's gradients only
        loss = super()._gradients_of(closure)
        # or it takes none, or adds to those of earlier micro-batches
        if self._accumulates or all(parameter.grad is None for parameter in self._parameters):
            for parameter, gradient in zip(self._parameters, earlier, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        return loss

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def _observe(self) -> None:
        layout = self.layout
        gradients = layout.gradients()
        average_over_processes(gradients)
        says_something = usable(norm(gradients))
        self.skipped_perturbations = self.skipped_perturbations + ~says_something
        kept = [torch.where(says_something.to(g.device), -g if self._negate else g, 0.0) for g in gradients]
        layout.put_gradients(kept)

    @torch.no_grad()
    def _after_update(self) -> None:
        self._clear()
        self._norm = self._project_onto_ball(self._rho_at(self.steps - 1))
        self.train()

    def _forget_step(self) -> None:
        self._clear()
        super()._forget_step()

    def _project_onto_ball(self, rho: float) -> Tensor:
        """Scale the second adapter into its ball; returns the norm of the merged perturbation."""
        squares = []
        for group in self._groups:
            wide = torch.promote_types(group[0].A.dtype, torch.float32)
            A = torch.stack([second.A for second in group]).flatten(2).to(wide)
            B = torch.stack([second.B for second in group]).flatten(2).to(wide)
            squares.append(((B.mT @ B) * (A @ A.mT)).sum())
        c = torch.stack([s.to(squares[0].device) for s in squares]).sum().clamp_min(0).sqrt()
        shrink = torch.where(c > rho, (rho / c).sqrt(), 1.0)
        weights = self.layout.weights()
        for weight in weights:
            weight.mul_(shrink.to(weight.device))
        self.layout.copy_(weights)
        return torch.clamp(c, max=rho)

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "second": [p.detach().clone() for p in self._parameters]}

    @torch.no_grad()
    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        super()._load_own_state(own)
        for parameter, stored in zip(self._parameters, own["second"], strict=True):
            parameter.copy_(stored)


class _SecondAdapter:
    """The second adapter of one layer, added to the layer's output by a hook."""

    def __init__(self, factors: LoRAFactors, r: int | None, generator: torch.Generator) -> None:
        self.factors = factors
        self._apply = _application(factors)
        rank = r or factors.A.shape[0]
        A_shape = (rank, *factors.A.shape[1:])
        B_shape = (factors.B.shape[0], rank, *factors.B.shape[2:])
        # as peft initialises: A as a linear layer's weight, B with zeros
        bound = 1 / math.sqrt(math.prod(factors.A.shape[1:]))
        A = torch.empty(A_shape).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device=factors.A.device, dtype=factors.A.dtype))
        self.B = nn.Parameter(torch.zeros(B_shape, device=factors.B.device, dtype=factors.B.dtype))
        self.active = False
        self._hook = _Hook()
        self._hook.serve(self)
        factors.layer.register_forward_hook(self._hook)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hook.serve(self)  # of the layer's copy, where that was made with it

    def key(self) -> tuple[str, ...]:
        """Layers with equal keys can be treated as one batch."""
        return (str(self.A.shape), str(self.B.shape), str(self.A.dtype))

    def follow(self) -> None:
        """Lie on the device on which the layer lies now."""
        device = self.factors.A.device
        if self.A.device != device:
            self.A.data, self.B.data = self.A.data.to(device), self.B.data.to(device)

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the second adapter's."""
        x = x.to(self.A.dtype) if x.is_floating_point() else x
        base: Any = self.factors.layer.get_base_layer()
        added: Tensor = self._apply(base, x, self.A, self.B, output)
        return added


class _Hook:
    """Forward hook of a layer; in a copy of the layer it does nothing, unless the optimizer is copied too."""

    def __init__(self) -> None:
        self._second_adapter: _SecondAdapter | None = None
        self._layer: Any = None

    def serve(self, second: _SecondAdapter) -> None:
        """Add this second adapter."""
        self._second_adapter, self._layer = second, second.factors.layer

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        second = self._second_adapter
        if second is None or not second.active or layer is not self._layer:
            return None
        return second.add(inputs[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        made = memo[id(self)] = _Hook()
        return made

    def __reduce__(self) -> Any:
        return (_Hook, ())


Application = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def _application(factors: LoRAFactors) -> Application:
    """``layer, x, A2, B2, y -> y + B2·A2·x`` for the kind of layer; InputError for one not known here."""
    if factors.kind == "linear" and type(factors.layer).__name__ != "MultiheadAttention":
        return _add_linear
    if factors.kind == "embedding":
        return _add_embedding
    if factors.kind == "convolution":
        return _add_convolution
    # a parameter may be used in any way: x @ P, of which B2·A2 would be the transpose
    raise InputError(
        f"bi_lora: {factors.name}: no second adapter for a {type(factors.layer).__name__} here; leave the "
        "module out of target_modules"
    )


def _add_embedding(base: Any, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    found = nn.functional.embedding(x, A.T) @ B.T
    scale = getattr(base, "embed_scale", None)  # Gemma's embeddings scale what they look up
    return y + (found if scale is None else found * scale).to(y.dtype)


def _add_convolution(base: Any, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    functional = nn.functional
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[A.ndim - 2]
    return y + convolve(convolve(x, A, None, base.stride, base.padding), B).to(y.dtype)


def _add_linear(_: Any, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    hidden = nn.functional.linear(x, A)
    if hidden.dtype != y.dtype:
        return y + nn.functional.linear(hidden, B).to(y.dtype)
    # one pass over the output less than adding to it
    return torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), B.T).view_as(y)
