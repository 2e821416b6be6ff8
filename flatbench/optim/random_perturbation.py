"""Flat-LoRA by random weight perturbation (Li et al. 2024, arXiv 2409.14396)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.spaces import memory_of
from flatbench.distributed import shards
from flatbench.errors import InputError
from flatbench.models.factors import LoRAFactors, lora_factors, parameter_holders, refuse_attention
from flatbench.optim.base import Norm, PerturbationOptions, RhoSchedule
from flatbench.optim.base.two_points import TwoPoints
from flatbench.seeding import derive_seed


@dataclass(kw_only=True, eq=False, repr=False)
class RandomPerturbation(PerturbationOptions, TwoPoints):
    """Flat-LoRA of arXiv 2409.14396: gradients under Gaussian noise on the merged weight; one a step.

    Entry (i, j) of the noise has standard deviation ``rho_t/√m·‖(W0 + s·B·A)_i‖``, and rho_t grows
    from 0 to rho with half a cosine. The noise of a step depends on the seed and the step alone, so that all
    micro-batches of the step see the same, and so do all processes.

    It enters W0: in training the layer's frozen weight is replaced by a noisy copy, and put back by putting
    the original tensor back, which no rounding can disturb (the authors' code adds and subtracts). That
    takes one copy of the adapted layers' weights. Of a model in shards each process keeps a copy of its part,
    and for a moment has the whole weights of the layers of one shape. See
    `flatbench.optim.base.two_points.TwoPoints` for when the noise is there.

    Args:
        base_optimizer: makes the update.
        model: a model with LoRA layers that train, whose base weights are floating-point numbers.
        rho: size of the noise at the end of training, relative to the rows of W.
        every: noise in every k-th step only.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        seed: of the noise; a study takes a stream of the run's seed.

    Raises:
        InputError: no LoRA layer trains; a base weight is quantised, trains itself or is shared with another
            layer; a layer is of a kind whose rows are not known.
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    needs_adapter: ClassVar[bool] = True

    rho_schedule: RhoSchedule = "growing_cosine"
    seed: int | None = None
    # no option: the noise follows the rows of each matrix
    norm: Norm = field(default="layer", init=False)

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        layers = _layers(self.model)
        self._groups = [
            _Group(list(group)) for _, group in groupby(sorted(layers, key=_Layer.key), _Layer.key)
        ]
        super().__post_init__(base_optimizer)

    def moved_parameters(self) -> list[Tensor]:
        """The parameters that differ between the two points."""
        own: list[Tensor] = [layer.weight for group in self._groups for layer in group.layers]
        return own + (super().moved_parameters() if self.modes.exist else [])

    @torch.no_grad()
    def _move_away(self) -> None:
        if self.away or self.steps % self.every:
            return
        rho, seed = (
            self._fixed_radius(self._rho_at(self.steps)),
            derive_seed(self.seed or 0, "noise", self.steps),
        )
        generators: dict[torch.device, torch.Generator] = {}
        squares = []
        for group in self._groups:
            if group.device not in generators:
                generator = torch.Generator(group.device)
                generators[group.device] = generator.manual_seed(seed)
            squares.append(group.perturb(rho, generators[group.device]))
        self._norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        self.away = True

    @torch.no_grad()
    def _move_back(self) -> None:
        if self.away:
            for group in self._groups:
                group.restore()
            self.away = False


class _Layer:
    """An adapted module's frozen weight, as torch stores it, with the adapters that add to it."""

    def __init__(self, factors: Sequence[LoRAFactors], weight: nn.Parameter) -> None:
        self.factors, self.weight = list(factors), weight
        #: whether the stored matrix is Wᵀ
        self.transposed = factors[0].kind == "embedding" or bool(
            getattr(factors[0].layer, "fan_in_fan_out", 0)
        )

    def replaced_by(self, weight: Tensor) -> Tensor:
        """Put another weight in this one's place; returns what `put_back` needs."""
        if not shards.is_divided(self.weight):
            original = self.weight.data
            self.weight.data = weight
            return original
        # what is gathered next comes from the memory of this process's part
        copy = shards.own(self.weight).clone()
        shards.put(self.weight, weight)
        return copy

    def put_back(self, original: Tensor) -> None:
        """Put the weight back, bit by bit."""
        if shards.is_divided(self.weight):
            shards.own(self.weight).copy_(original)
        else:
            self.weight.data = original

    def key(self) -> tuple[str, ...]:
        """Layers with equal keys can be treated as one batch."""
        shapes = [(f.A.shape, f.B.shape) for f in self.factors]
        return (str(shards.shape(self.weight)), str(self.transposed), str(shapes), str(self.weight.dtype))


def _layers(model: nn.Module) -> list[_Layer]:
    factors = lora_factors(model)
    if not factors:
        raise InputError("flat_lora_rwp puts noise on adapted weights, and no LoRA layer of the model trains")
    refuse_attention("flat_lora_rwp", model)
    holders = parameter_holders(model)
    bases = {id(f.layer.get_base_layer()) for f in factors}
    found: dict[Hashable, _Layer] = {}
    for name, group in groupby(factors, lambda f: f.name):
        adapters = list(group)
        if adapters[0].kind == "parameter":
            raise InputError(
                f"flat_lora_rwp: {name} ({type(adapters[0].layer).__name__}): the noise follows the rows of "
                "a layer's weight, and which of a parameter's are rows is not known; leave it out of "
                "target_parameters"
            )
        base: Any = adapters[0].layer.get_base_layer()
        weight: Any = base.weight
        if weight is not base._parameters.get("weight"):
            raise InputError(
                f"flat_lora_rwp: the base weight of {name} is computed (parametrized, normed), and noise in "
                "it would be lost at the next call; leave it out of target_modules"
            )
        matrix = len(shards.shape(weight)) >= 2
        if not weight.is_floating_point() or hasattr(weight, "quant_state") or not matrix:
            raise InputError(
                f"flat_lora_rwp: the base weight of {name} is quantised ({type(weight).__name__}, "
                f"{weight.dtype}), and noise cannot be added to it; load the model without quantisation, or "
                "choose another method"
            )
        if weight.requires_grad:
            raise InputError(f"flat_lora_rwp: the base weight of {name} trains itself; freeze it")
        place = memory_of(weight)
        if place in found:
            raise InputError(
                f"flat_lora_rwp: {name} and {found[place].factors[0].name} share their base weight "
                "(tied weights), whose noise would follow two adapters; leave one out of target_modules"
            )
        others = [own for own, module in holders(weight) if id(module) not in bases]
        if others:
            raise InputError(
                f"flat_lora_rwp: {name} shares its base weight with {others[0]} (tied weights), which would "
                "get the noise too; leave it out of target_modules"
            )
        found[place] = _Layer(adapters, weight)
    return list(found.values())


class _Group:
    """Layers of one shape and type, treated as one batch of matrices."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = list(layers)
        self._originals: list[Tensor] = []
        self._noisy: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the layers are now."""
        return self.layers[0].weight.device

    def perturb(self, rho: float, generator: torch.Generator) -> Tensor:
        """Put noisy copies in the weights' place; returns the noise's squared norm, 0-dimensional."""
        originals = [shards.whole(layer.weight) for layer in self.layers]
        first = originals[0]
        shape = (len(self.layers), *first.shape)
        if self._noisy is None or self._noisy.device != first.device:
            self._noisy = torch.empty(shape, dtype=first.dtype, device=first.device)
        # one buffer for all: the merged weight, then the noise, then the noisy weight
        matrices = self._noisy.flatten(2)
        rows = [original.flatten(1) for original in originals]
        self._write_merged(matrices)
        torch._foreach_add_(list(matrices.unbind()), rows)
        inputs = 1 if self.layers[0].transposed else 2
        wide = torch.promote_types(first.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(matrices, dim=inputs, keepdim=True, dtype=wide)
        deviation = lengths * (rho / matrices.shape[inputs] ** 0.5)
        matrices.normal_(generator=generator)
        matrices.mul_(deviation)
        squares: Tensor = torch.linalg.vector_norm(matrices, dtype=wide).square()
        torch._foreach_add_(list(matrices.unbind()), rows)
        self._originals = [
            layer.replaced_by(noisy) for layer, noisy in zip(self.layers, self._noisy.unbind(), strict=True)
        ]
        if shards.is_divided(self.layers[0].weight):
            self._noisy = None
        return squares

    def _write_merged(self, matrices: Tensor) -> None:
        """Write ``Σ s·B·A`` of each layer's adapters, transposed where the weight is."""
        for i in range(len(self.layers[0].factors)):
            factors = [layer.factors[i] for layer in self.layers]
            A = torch.stack([f.A for f in factors]).flatten(2).to(matrices.dtype)
            # s goes into B here, so that it needs no copy to the device
            B = torch.stack(torch._foreach_mul([f.B for f in factors], [f.scaling for f in factors]))
            B = B.flatten(2).to(matrices.dtype)
            left, right = (A.mT, B.mT) if self.layers[0].transposed else (B, A)
            torch.baddbmm(matrices, left, right, beta=0 if i == 0 else 1, out=matrices)

    def restore(self) -> None:
        """Put the original tensors back."""
        for layer, original in zip(self.layers, self._originals, strict=True):
            layer.put_back(original)
        self._originals = []
