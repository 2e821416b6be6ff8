"""What processes of one group compute together, in a module that a started process can import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature import (
    GaussNewtonOperator,
    HessianOperator,
    over_processes,
    spectral_density,
    top_eigenpairs,
    trace,
)
from flatbench.curvature.operators.fingerprint import fingerprint
from flatbench.errors import FlatbenchError

#: terms of the processes' parts of the quadratic, and of the examples of each batch of text
PARTS = (5, 1, 10)


class Quadratic(nn.Module):
    """``½ wᵀA w`` for the batch's matrix A."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, matrix: Tensor) -> Tensor:
        return self.w @ matrix @ self.w / 2


def planted(size: int = 120) -> tuple[Tensor, list[Tensor]]:
    """A matrix with two outliers close together above a bulk, and parts of which it is the weighted mean."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.tensor([10.0, 9.9]), torch.rand(size - 2, generator=generator)]).double()
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    whole = (basis * values) @ basis.T
    parts = []
    for _ in PARTS[:-1]:
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        parts.append(whole + 3 * (noise + noise.T))
    rest = sum(PARTS) * whole - sum(n * part for n, part in zip(PARTS, parts, strict=False))
    return whole, [*parts, rest / PARTS[-1]]


class Words(nn.Module):
    """A classifier of tokens, some of which have no label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 11)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return found


def texts() -> list[dict[str, Tensor]]:
    """A ragged batch for each process."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rank, count in enumerate(PARTS):
        ids = torch.randint(0, 11, (count, 4 + rank), generator=generator)
        labels = ids.roll(-1, dims=1).masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
        labels[:, 0] = ids[:, 1]
        batches.append({"ids": ids, "labels": labels})
    return batches


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Mean over the labels, and their number."""
    logits, labels = model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
    return nn.functional.cross_entropy(logits, labels), int((labels != -100).sum())


def without_terms(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A mean over labels that calls itself one over rows."""
    return loss(model, batch)[0]


def criterion(outputs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    labels = batch["labels"].flatten()
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels), int((labels != -100).sum())


def operators(batches: list[dict[str, Tensor]], space: str = "all") -> dict[str, Any]:
    """Of both kinds, over some batches, in float64."""
    model = Words().double()
    return {
        "hessian": HessianOperator(model, loss, batches, space=space),
        "differences": HessianOperator(model, loss, batches, space=space, products="differences"),
        "gauss_newton": GaussNewtonOperator(model, lambda m, b: m(b["ids"]), criterion, batches, space=space),
    }


def quadratic_loss(weight: int) -> Callable[[nn.Module, Any], tuple[Tensor, int]]:
    return lambda model, batch: (model(batch["matrix"][0]), weight)


def computed(whole: Any) -> dict[str, Any]:
    """Products, estimates and the loss."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(whole.dimension, 5, generator=generator, dtype=whole.dtype)
    density = spectral_density(whole, steps=6, probes=3, seed=0)
    return {
        "products": whole @ vectors,
        "one": whole @ vectors[:, 0],
        "point": whole.point(),
        "trace": trace(whole, seed=0).value,
        "density": density.values,
        "values": top_eigenpairs(whole, k=3, seed=0).values,
    }


def refused(make: Callable[[], Any]) -> tuple[str, str]:
    """Kind and words of what is raised."""
    try:
        make()
    except (FlatbenchError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def everything(folder: Path) -> None:
    """In each process; saved by rank."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = texts()[rank]
    found: dict[str, Any] = {
        name: over_processes(operator, computed) for name, operator in operators([mine]).items()
    }
    model = Quadratic(120)
    quadratic = HessianOperator(
        model, quadratic_loss(PARTS[rank]), [{"matrix": planted()[1][rank][None]}], memory=10**8
    )
    found["planted"] = over_processes(quadratic, lambda whole: top_eigenpairs(whole, k=2, tol=1e-3, seed=0))

    words = Words().double()
    before = fingerprint(words).checksums
    bad = {**mine, "ids": mine["ids"] + 100 * (rank == 2)}  # words that there are not
    operator = HessianOperator(words, loss, [mine])
    found["refused"] = {
        "a batch": refused(
            lambda: over_processes(HessianOperator(words, loss, [bad]), lambda w: w @ torch.ones(w.dimension))
        ),
        "no mean": refused(
            lambda: over_processes(HessianOperator(words, without_terms, [mine]), lambda w: w.point()[0])
        ),
        "its own": refused(lambda: over_processes(operator, lambda w: operator @ torch.ones(w.dimension))),
        "what raises": refused(lambda: over_processes(operator, lambda w: 1 // 0)),
        "no pickle": refused(lambda: over_processes(operator, lambda w: lambda: w)),
    }
    other = Words().double()
    with torch.no_grad():
        other.head.bias[0] += rank
    found["refused"]["weights"] = refused(
        lambda: over_processes(HessianOperator(other, loss, [mine]), lambda w: w.point()[0])
    )

    def louder(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        value, terms = loss(model, batch)
        return value * (1 + rank), terms

    found["refused"]["loss"] = refused(
        lambda: over_processes(HessianOperator(words, louder, [mine]), lambda w: w.point()[0])
    )
    empty = {**mine, "labels": torch.full_like(mine["labels"], -100)}
    some = HessianOperator(words, loss, [empty if rank == 1 else mine])
    found["without terms"] = over_processes(some, lambda w: (w.point(), w @ torch.ones(w.dimension).double()))
    found["refused"]["no terms"] = refused(
        lambda: over_processes(HessianOperator(words, loss, [empty]), lambda w: w.point()[0])
    )
    pair = torch.distributed.new_group([1, 2])
    if rank:  # the first of a group need not be the first of all
        found["pair"] = over_processes(HessianOperator(words, loss, [mine]), lambda w: w.point(), pair)
    found["unchanged"] = fingerprint(words).checksums == before and words.training
    found["again"] = over_processes(operator, lambda whole: whole.point())
    torch.save(found, folder / f"{rank}.pt")


def alone() -> SimpleNamespace:
    """The same in one process over all batches."""
    return SimpleNamespace(**{name: computed(operator) for name, operator in operators(texts()).items()})
