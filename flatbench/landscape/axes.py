"""The directions that slices and planes run along: random, Hessian, gradient, line, trajectory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.lanczos import top_eigenpairs
from flatbench.curvature.eigenpairs.ritz import Which
from flatbench.curvature.operators.graphs import lacks_second_derivative
from flatbench.curvature.operators.hessian import HessianOperator
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.landscape.evaluation.weights import Direction
from flatbench.models import weights
from flatbench.seeding import derive_seed
from flatbench.subject.directions import Normalisation, random_direction
from flatbench.subject.objective import Objective, first_examples, norm
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject

log = logging.getLogger(__name__)

#: examples on which the end of a line is compared with the checkpoint that it leads to
_FEW = 64


@dataclass(frozen=True)
class Axis:
    """One direction in weight space, with what a figure writes beside it.

    Attributes:
        direction: a tensor for each parameter of the space.
        label: what it is and in which unit distances along it are.
        span: the positions (lowest, highest) that are looked at unless the caller says else.
        facts: JSON-able numbers about it (its length, an eigenvalue, a share of variance).
    """

    direction: Direction
    label: str
    span: tuple[float, float]
    facts: dict[str, Any] = field(default_factory=dict)


class Axes(ABC):
    """Where the directions of a slice or a plane come from."""

    #: whether other draws of the same kind exist, so that a spread over them means something
    random = False
    #: whether two of these directions are what is usually looked at
    plane = False
    #: whether the directions need second derivatives
    twice_differentiable = False

    @abstractmethod
    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """The first ``count`` directions at a point; ``seed`` decides random ones."""

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """JSON-able: what the directions depend on beside subject, space and seed."""

    def path(self) -> Sequence[Sequence[float]] | None:
        """Points of a training trajectory in the coordinates of the axes last drawn, if there is one."""
        return None


@dataclass
class Random(Axes):
    """Gaussian directions, by default filter-normalised (Li et al. 2018, arXiv 1712.09913, Section 4).

    Args:
        normalisation: ``filter``, ``layer`` or ``none``; see `flatbench.subject.directions`.
    """

    normalisation: Normalisation = "filter"
    random = True

    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """Independent draws. Raises NotApplicableError if nothing of them is left by the normalisation."""
        unit = {
            "filter": "filter-normalised: 1 = ‖filter‖",
            "layer": "layer-normalised: 1 = ‖layer‖",
            "none": "ℓ2 distance",
        }[self.normalisation]
        axes = []
        for i in range(count):
            # the first is the direction that a study's slices take with this seed
            own = seed if i == 0 else derive_seed(seed, "axis", i)
            direction = random_direction(point, self.normalisation, own)
            label = f"random direction{f' {i + 1}' if count > 1 else ''} ({unit})"
            axes.append(Axis(direction, label, (-1.0, 1.0), {"norm": norm(direction)}))
        return axes

    def key(self) -> dict[str, Any]:
        """Kind and normalisation."""
        return {"kind": "random", "normalisation": self.normalisation}


@dataclass
class Hessian(Axes):
    """Unit eigenvectors of the training loss's Hessian, largest eigenvalue first.

    The default span is where the quadratic ``λ·t²/2`` has risen by 1.

    Args:
        tol: relative error allowed of an eigenvalue.
        which: largest (``LA``), smallest (``SA``) or largest in magnitude (``LM``).
        max_products: limit of Hessian-vector products; the eigensolver's own if None.
        examples: use only the first that many training examples; None for all.
    """

    tol: float = 1e-3
    which: Which = "LA"
    max_products: int | None = None
    examples: int | None = None
    twice_differentiable = True

    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """The leading eigenvectors; errors and residuals are among the facts.

        Raises NotApplicableError if the loss has no second derivative.
        """
        operator = HessianOperator(
            point.model,
            subject.loss,
            first_examples(subject.batches, self.examples),
            space=point.parameters,
            precision=point.precision,
        )
        try:
            found = top_eigenpairs(
                operator,
                count,
                tol=self.tol,
                which=self.which,
                max_products=self.max_products,
                seed=derive_seed(seed, "hessian") % 2**62,
            )
        except RuntimeError as error:
            if lacks_second_derivative(error):
                raise NotApplicableError(f"the loss has no second derivative: {error}") from error
            raise
        axes = []
        for i, value in enumerate(found.values):
            reach = math.sqrt(2 / abs(value)) if value else 1.0
            facts = {
                "eigenvalue": value,
                "error": found.errors[i],
                "residual": found.residuals[i],
                "converged": found.converged[i],
                "products": found.products,
                "norm": 1.0,
            }
            label = f"Hessian eigenvector {i + 1} (λ = {value:.3g}; ℓ2 distance)"
            axes.append(Axis(list(operator.split(found.vectors[:, i])), label, (-reach, reach), facts))
        return axes

    def key(self) -> dict[str, Any]:
        """Kind and the solver's options."""
        return {"kind": "hessian", **dataclasses.asdict(self)}


@dataclass
class Gradient(Axes):
    """The unit gradient of the training loss: the direction in which SAM looks, ``g/‖g‖``."""

    examples: int | None = None

    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """One direction. Raises NotApplicableError where the gradient is zero."""
        if count > 1:
            raise InputError("the gradient is one direction; name a second one, as ('gradient', 'random')")
        loss, gradient = Objective(subject, point, self.examples).gradient()
        length = norm(gradient)
        if length == 0:
            raise NotApplicableError("the gradient is zero: it names no direction")
        direction = [part / length for part in gradient]
        facts = {"gradient_norm": length, "norm": 1.0, "loss": loss}
        return [Axis(direction, "gradient (SAM's direction; ℓ2 distance ρ)", (-0.5, 0.5), facts)]

    def key(self) -> dict[str, Any]:
        """Kind and the number of examples."""
        return {"kind": "gradient", "n": self.examples}


@dataclass
class Line(Axes):
    """The straight line to another checkpoint of the same architecture: 0 is this one, 1 the other.

    In a space that does not hold all weights, the others (a head) stay what they are here. Where that makes
    the end another function than the other checkpoint, the label and the log say so.
    """

    other: Subject
    name: str = "the other checkpoint"

    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """One direction. Raises InputError if the checkpoints' weights do not correspond."""
        if count > 1:
            raise InputError("a line is one direction; name a second one, as (Line(other), 'random')")
        there = weights_in(self.other, point.space, point)
        direction = [b - p.detach() for p, b in zip(point.parameters.values(), there, strict=True)]
        length = norm(direction)
        if length == 0:
            raise InputError(f"{self.name} has the same weights in the {point.space} space: no line")
        facts, where = {"norm": length}, "there"
        if differing := _other_end(subject, point, self.other, direction):
            there_itself, at_the_end = differing
            facts |= {"loss_there": there_itself, "loss_at_1": at_the_end}
            where = f"its {point.space} weights, all others from here"
            log.warning(
                "the line in the space '%s' ends with a loss of %.4g on a few examples, and %s has %.4g: "
                "they differ in weights outside the space, such as a head; space='all' moves every weight",
                point.space,
                at_the_end,
                self.name,
                there_itself,
            )
        return [Axis(direction, f"towards {self.name} (0 = here, 1 = {where})", (-0.5, 1.5), facts)]

    def key(self) -> dict[str, Any]:
        """Kind and the other checkpoint's weights."""
        return {"kind": "line", "other": weights.digest(self.other.model)}


class Trajectory(Axes):
    """The first principal components of a training trajectory that ends at this checkpoint.

    As in Li et al. 2018 (arXiv 1712.09913, Section 7.2): PCA of the matrix of ``θ_i − θ_n``, columns centred.
    Coordinates are ℓ2 distances along the unit components, from this checkpoint.

    Args:
        checkpoints: the trained model at earlier moments, oldest first, of the same architecture.
    """

    plane = True

    def __init__(self, checkpoints: Sequence[Subject]) -> None:
        if len(checkpoints) < 2:
            raise InputError("a trajectory needs at least two earlier checkpoints")
        self.checkpoints = list(checkpoints)
        self._path: list[list[float]] = []

    def draw(self, subject: Subject, point: Point, seed: int, count: int) -> list[Axis]:
        """The components with the most variance. Raises InputError if the trajectory spans fewer."""
        here = [p.detach() for p in point.parameters.values()]
        steps = [
            [there - own for there, own in zip(weights_in(c, point.space, point), here, strict=True)]
            for c in self.checkpoints
        ]
        steps.append([torch.zeros_like(part) for part in here])
        components, shares = principal_components(steps, count)
        self._path = [[_inner(step, component) for component in components] for step in steps]
        if differing := _other_end(subject, point, self.checkpoints[0], steps[0]):
            there_itself, at_the_end = differing
            log.warning(
                "the trajectory in the space '%s' leaves out weights that changed: at the first checkpoint's "
                "place the loss is %.4g on a few examples, its own is %.4g; space='all' moves every weight",
                point.space,
                at_the_end,
                there_itself,
            )
        axes = []
        for i, (component, share) in enumerate(zip(components, shares, strict=True)):
            along = [position[i] for position in self._path]
            margin = 0.25 * (max(along) - min(along))
            label = f"trajectory's PC {i + 1} ({100 * share:.0f} % of variance; ℓ2 distance)"
            facts = {"variance_share": share, "norm": 1.0}
            axes.append(Axis(component, label, (min(along) - margin, max(along) + margin), facts))
        return axes

    def key(self) -> dict[str, Any]:
        """Kind and the weights of every checkpoint."""
        return {"kind": "trajectory", "of": [weights.digest(c.model) for c in self.checkpoints]}

    def path(self) -> Sequence[Sequence[float]] | None:
        """Projections ``(θ_i − θ_n)·v``, oldest first; the last is the origin."""
        return self._path


def principal_components(steps: Sequence[Direction], count: int) -> tuple[list[list[Tensor]], list[float]]:
    """Unit principal components of some weight vectors (centred) and each one's share of the variance.

    By the Gram matrix of the vectors, ``(moments, moments)``, in float64: no matrix as wide as the space.

    Raises InputError if they span fewer than ``count`` dimensions.
    """
    gram = torch.tensor([[_inner(a, b) for b in steps] for a in steps], dtype=torch.float64)
    centre = torch.eye(len(steps), dtype=torch.float64) - 1 / len(steps)
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    values, vectors = values.flip(0), vectors.flip(1)
    if len(steps) <= count or float(values[count - 1]) <= 1e-12 * float(values[0]):
        raise InputError(f"the trajectory spans fewer than {count} dimensions; give more checkpoints")
    components = []
    for i in range(count):
        mix = centre @ vectors[:, i] / values[i].sqrt()
        component = [
            sum((float(m) * part for m, part in zip(mix, parts, strict=True)), torch.zeros_like(parts[0]))
            for parts in zip(*steps, strict=True)
        ]
        length = norm(component)
        components.append([part / length for part in component])
    return components, (values[:count] / values.clamp_min(0).sum()).tolist()


def _other_end(subject: Subject, point: Point, other: Subject, step: Direction) -> tuple[float, float] | None:
    """Losses of a few examples of another checkpoint, and of this one a step away, if they differ.

    None too where one of them is not finite, which the picture shows.
    """
    few = first_examples(subject.batches, _FEW)
    with contextlib.suppress(FlatbenchError):
        with point.moved(step):
            moved = Objective(dataclasses.replace(subject, batches=few), point, None).value()
        with in_space(other, point.space, precision=point.precision) as there:
            own = Objective(dataclasses.replace(other, batches=few), there, None).value()
        if not math.isclose(own, moved, rel_tol=1e-2, abs_tol=1e-4):
            return own, moved
    return None


def _inner(a: Direction, b: Direction) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def weights_in(subject: Subject, space: NamedSpace, like: Point) -> list[Tensor]:
    """Copies of another checkpoint's weights in a space, for the parameters of a point.

    Parameters correspond by their place among those of the space, so that adapters may differ in name.

    Raises InputError if shapes differ.
    """
    with in_space(subject, space, precision=like.precision) as other:
        full = list(other.parameters.items())
        # a point may be narrowed to a part of its space, whose parameters all require gradients
        spanning = [id(p) for p in like.model.parameters() if p.requires_grad]
        if len(full) != len(spanning):
            raise InputError(
                f"the checkpoints do not correspond: {len(spanning)} and {len(full)} weights in the "
                f"{space} space"
            )
        moving = {id(p) for p in like.parameters.values()}
        wanted = [i for i, parameter in enumerate(spanning) if parameter in moving]
        found = []
        for i, (name, own) in zip(wanted, like.parameters.items(), strict=True):
            if full[i][1].shape != own.shape:
                raise InputError(
                    f"the checkpoints do not correspond: {name} is {tuple(own.shape)} here and "
                    f"{tuple(full[i][1].shape)} there"
                )
            found.append(full[i][1].detach().to(own).clone())
        return found


#: what the directions are called in calls and study files
NAMES: dict[str, type[Axes]] = {"random": Random, "hessian": Hessian, "gradient": Gradient}


def resolve(along: str | Axes, normalisation: Normalisation) -> Axes:
    """The axes that a name stands for. Raises InputError for an unknown one."""
    if isinstance(along, Axes):
        return along
    if along not in NAMES:
        raise InputError(
            f"along: unknown direction '{along}'; known: {', '.join(NAMES)}, a Line or a Trajectory"
        )
    return Random(normalisation) if along == "random" else NAMES[along]()
