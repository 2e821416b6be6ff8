"""IVON: a Gaussian over the weights instead of a point (arXiv 2402.17641; on LoRA, arXiv 2506.14280)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.distributed.shard import Shard
from flatbench.errors import InputError
from flatbench.optim.base.buffers import total_norm
from flatbench.optim.base.two_points import Displaced
from flatbench.seeding import derive_seed


class IVON(Displaced):
    """IVON: gradients at draws from a Gaussian whose spread follows an online estimate of the Hessian.

    The weights are ``N(m, 1/(ess·(h + δ)))`` by entries, h an estimate of the Hessian's diagonal. It makes
    its own update, at the cost of AdamW's. With the draw ``m + ε`` and its gradient ĝ:
    ``ĥ = ĝ·ε·ess·(h + δ)``, ``g ← β1·g + (1 - β1)·ĝ``,
    ``h ← β2·h + (1 - β2)·ĥ + (1 - β2)²·(h - ĥ)²/(2·(h + δ))``,
    ``m ← m - lr·(h0 + δ)·(g/(1 - β1^t) + δ·m)/(h + δ)``, all by entries.

    The weights are at a draw between steps, and at the mean m where they are evaluated and saved; see
    `flatbench.optim.base.two_points.TwoPoints`. A draw depends on the seed and the step alone. The authors'
    package (ivon-opt), against which this is tested, puts all parameters into one storage, which elsewhere
    means tied weights, and does not keep its number of steps with its state; so the rule is written anew.

    Args:
        base_optimizer: lends its parameter groups, with learning rate and weight decay δ, and its hooks; it
            makes no update itself.
        model: the model.
        ess: effective size of the training set, by which the posterior narrows; a study takes the number of
            training examples.
        hess_init: h0, with which h begins.
        beta1: of the gradient's moving average.
        beta2: of the Hessian's.
        clip_radius: each entry's step over the learning rate is cut to this; not at all if None.
        seed: of the draws; a study takes a stream of the run's seed.

    Raises:
        InputError: the base optimizer is a method itself or consists of several, or what trains is
            divided among processes.
        ValueError: ``ess`` is missing, or a number is out of its range.
    """

    away_when_training: ClassVar[bool] = True

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        ess: Annotated[float, Field(gt=0)] | None = None,
        hess_init: Annotated[float, Field(gt=0)] = 1.0,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99999,
        clip_radius: Annotated[float, Field(gt=0)] | None = None,
        seed: int | None = None,
    ) -> None:
        if ess is None:
            raise ValueError("ivon needs ess, the effective size of the training set: its number of examples")
        for name, value in (("ess", ess), ("hess_init", hess_init), ("clip_radius", clip_radius)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"beta1 and beta2 must be in [0, 1), found {beta1} and {beta2}")
        if hasattr(base_optimizer, "gradients_per_step") or hasattr(base_optimizer, "parts"):
            raise InputError(
                f"ivon makes its own update and cannot go around {type(base_optimizer).__name__}; choose "
                "adamw"
            )
        if any(isinstance(p, Shard) for group in base_optimizer.param_groups for p in group["params"]):
            raise InputError(
                "ivon draws whole parameters, and those that train are divided among processes here; train "
                "an adapter, or leave the division out"
            )
        self.seed = seed or 0
        update = _Update(base_optimizer, ess, hess_init, (beta1, beta2), clip_radius)
        super().__init__(update, model)

    def _offset(self) -> list[Tensor]:
        update: Any = self.base
        noise = []
        for (p, group), z in zip(self._in_groups(), self.draws(self.steps), strict=True):
            noise.append(z * update.deviation(p, group))
        update.noise = {id(p): value for (p, _), value in zip(self._in_groups(), noise, strict=True)}
        self._norm = total_norm([torch.linalg.vector_norm(value) for value in noise])
        return noise

    def draws(self, step: int) -> list[Tensor]:
        """The standard normal draws of a step, counted from 0, in the shapes of the parameters."""
        generators: dict[torch.device, torch.Generator] = {}
        found = []
        for p, _ in self._in_groups():
            if p.device not in generators:
                seed = derive_seed(self.seed, "ivon", step)
                generators[p.device] = torch.Generator(p.device).manual_seed(seed)
            kind = torch.promote_types(p.dtype, torch.float32)
            z = torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=kind)
            found.append(z.to(p.dtype))
        return found

    def _in_groups(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]


class _Update(torch.optim.Optimizer):
    """The update of the mean and of the Hessian's estimate, over the groups of another optimizer.

    Attributes:
        noise: id of a parameter -> how far from the mean its gradient was taken.
    """

    def __init__(
        self,
        lender: torch.optim.Optimizer,
        ess: float,
        hess_init: float,
        betas: tuple[float, float],
        clip_radius: float | None,
    ) -> None:
        self.noise: dict[int, Tensor] = {}
        own = {"ess": ess, "hess_init": hess_init, "betas": betas, "clip_radius": clip_radius}
        kept = ("params", "lr", "weight_decay", "initial_lr")
        groups = [{k: v for k, v in group.items() if k in kept} for group in lender.param_groups]
        super().__init__(groups, {"lr": groups[0]["lr"], "weight_decay": 0.0, **own})
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(lender, hooks))

    def deviation(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Standard deviation of each entry's posterior."""
        state = self._state(p, group)
        deviation: Tensor = (group["ess"] * (state["hess"] + group["weight_decay"])).rsqrt()
        return deviation

    def _state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p)
            state["hess"] = torch.full_like(p, group["hess_init"])
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; a closure is the method's to call."""
        for group in self.param_groups:
            decay, (beta1, beta2), radius = group["weight_decay"], group["betas"], group["clip_radius"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, gradient = self._state(p, group), p.grad
                state["step"] += 1
                momentum, hess = state["momentum"], state["hess"]
                noise = self.noise.get(id(p))
                estimate = gradient * noise * group["ess"] * (hess + decay) if noise is not None else 0 * hess
                momentum.lerp_(gradient, 1 - beta1)
                correction = (1 - beta2) ** 2 / 2 * (hess - estimate).square() / (hess + decay)
                hess.lerp_(estimate, 1 - beta2).add_(correction)
                slope = momentum / (1 - beta1 ** state["step"]) + decay * p
                move = slope / (hess + decay)
                if radius is not None:
                    move = move.clamp(-radius, radius)
                p.sub_(move, alpha=group["lr"] * (group["hess_init"] + decay))
