"""The competing methods' rules written plainly, parameter by parameter, apart from `flatbench.optim`.

Each function makes one step on ``model`` with the gradients that ``closure`` leaves in its parameters; what a
rule remembers is kept in ``memory``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Memory = dict[str, Any]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.grad is not None]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in trained(model)]


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def dot(first: list[Tensor], second: list[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))


def second_gradient(model: nn.Module, closure: Any, epsilon: list[Tensor]) -> None:
    """Leave the gradient at w + epsilon in the parameters, and w where it was."""
    parameters = trained(model)
    old = [p.detach().clone() for p in parameters]
    for p, e in zip(parameters, epsilon, strict=True):
        p.data.add_(e)
    closure()
    for p, value in zip(parameters, old, strict=True):
        p.data.copy_(value)


def sam(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float) -> None:
    closure()
    g = gradients(model)
    norm = length(g)
    second_gradient(model, closure, [rho * x / norm for x in g])
    base.step()


def sam_per_layer(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float) -> None:
    closure()
    second_gradient(model, closure, [rho * x / (length([x]) or 1) for x in gradients(model)])
    base.step()


def asam(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float, vectors: bool = True) -> None:
    closure()
    g = gradients(model)
    T = [p.detach().abs() + 0.01 if p.ndim > 1 or vectors else torch.ones_like(p) for p in trained(model)]
    norm = length([t * x for t, x in zip(T, g, strict=True)])
    second_gradient(model, closure, [rho * t * t * x / norm for t, x in zip(T, g, strict=True)])
    base.step()


def gsam(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float) -> None:
    rho = (
        rho * base.param_groups[0]["lr"] / base.param_groups[0].get("initial_lr", base.param_groups[0]["lr"])
    )
    closure()
    g = gradients(model)
    norm = length(g)
    second_gradient(model, closure, [rho * x / norm for x in g])
    second = gradients(model)
    along = dot(g, second) / length(second) ** 2
    for p, first, there in zip(trained(model), g, second, strict=True):
        p.grad.copy_(there - 0.4 * (first - along * there))
    base.step()


def friendly_sam(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float, sigma: float) -> None:
    closure()
    g = gradients(model)
    if "m" in memory:
        reduced = [x - sigma * m for x, m in zip(g, memory["m"], strict=True)]
        memory["m"] = [0.9 * m + 0.1 * x for x, m in zip(g, memory["m"], strict=True)]
    else:
        reduced = g
        memory["m"] = g
    norm = length(reduced)
    second_gradient(model, closure, [rho * x / norm for x in reduced])
    base.step()


def looksam(model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float, k: int) -> None:
    step = memory.setdefault("step", 0)
    memory["step"] += 1
    closure()
    g = gradients(model)
    if step % k == 0:
        norm = length(g)
        second_gradient(model, closure, [rho * x / norm for x in g])
        there = gradients(model)
        cosine = dot(there, g) / (length(there) * norm)
        along = length(there) * cosine / norm
        memory["v"] = [x - along * y for x, y in zip(there, g, strict=True)]
    else:
        factor = 0.7 * length(g) / length(memory["v"])
        for p, x, v in zip(trained(model), g, memory["v"], strict=True):
            p.grad.copy_(x + factor * v)
    base.step()


def msam(
    model: nn.Module, base: Any, closure: Any, memory: Memory, rho: float, sign: float, key: str
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    momentum = [base.state[p].get(key) for p in parameters]
    old = [p.detach().clone() for p in parameters]
    if any(v is not None for v in momentum):
        norm = length([v for v in momentum if v is not None])
        for p, v in zip(parameters, momentum, strict=True):
            if v is not None:
                p.data.add_(sign * rho * v / norm)
    closure()
    for p, value in zip(parameters, old, strict=True):
        p.data.copy_(value)
    base.step()


def mgpo(
    model: nn.Module, base: Any, closure: Any, memory: Memory, layers: Any, rho: float, beta: float, key: str
) -> None:
    factors = [p for layer in layers for p in (layer.A, layer.B)]
    old = [p.detach().clone() for p in factors]
    if "mean" in memory:
        momentum = [base.state[p][key] for p in factors]
        norm = length(momentum)
        for p, m in zip(factors, momentum, strict=True):
            p.data.add_(rho * m / norm / memory["mean"])
    closure()
    norm = length([p.grad for p in factors])
    memory["mean"] = beta * memory["mean"] + (1 - beta) * norm if "mean" in memory else norm
    for p, value in zip(factors, old, strict=True):
        p.data.copy_(value)
    base.step()


def ivon(
    model: nn.Module, base: Any, closure: Any, memory: Memory, draws: Any, ess: float, h0: float
) -> None:
    step = memory["step"] = memory.get("step", 0) + 1
    entries = [(p, group) for group in base.param_groups for p in group["params"]]
    means = [p.detach().clone() for p, _ in entries]
    noise = []
    for i, ((p, group), z) in enumerate(zip(entries, draws(step - 1), strict=True)):
        h = memory.setdefault(f"h{i}", torch.full_like(p, h0))
        noise.append(z / (ess * (h + group["weight_decay"])).sqrt())
        p.data.add_(noise[-1])
    closure()
    for i, ((p, group), mean) in enumerate(zip(entries, means, strict=True)):
        decay, h, g = group["weight_decay"], memory[f"h{i}"], p.grad
        seen = g * noise[i] * ess * (h + decay)
        momentum = 0.9 * memory.get(f"g{i}", torch.zeros_like(p)) + 0.1 * g
        memory[f"g{i}"] = momentum
        h = 0.99999 * h + 0.00001 * seen + 0.5 * 0.00001**2 * (h - seen) ** 2 / (h + decay)
        memory[f"h{i}"] = h
        move = (momentum / (1 - 0.9**step) + decay * mean) / (h + decay)
        p.data.copy_(mean - group["lr"] * (h0 + decay) * move)


def bar(
    model: nn.Module, base: Any, closure: Any, memory: Memory, layers: Any, kind: str, total: int
) -> None:
    step = memory.setdefault("step", 0)
    memory["step"] += 1
    closure()
    amount = 0.25 * (1 - step / total) * base.param_groups[0]["lr"]
    for layer in layers:
        x, y = layer.B, layer.A
        if kind == "obar":
            first_down = length([x.data]) >= length([y.data])
        else:
            first_down = not length([x.grad]) >= length([y.grad])
        sign = -1 if first_down else 1
        x.data.mul_(1 + sign * amount)
        y.data.mul_(1 - sign * amount)
    base.step()
