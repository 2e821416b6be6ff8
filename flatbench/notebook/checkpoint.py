"""A saved or live model with data and loss, for notebooks: the command line's measures, and landscapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatbench import measures
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.model_state import as_found
from flatbench.curvature.operators.pieces import sample_of
from flatbench.curvature.operators.precision import half_types
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import InputError, NotApplicableError
from flatbench.landscape.axes import Axes, Line, Trajectory
from flatbench.landscape.content import data_digest
from flatbench.landscape.evaluation.collect import LogitsFunction
from flatbench.landscape.explore import landscape
from flatbench.landscape.result import Landscape
from flatbench.machine import cache
from flatbench.models import weights
from flatbench.notebook.data import Batch
from flatbench.notebook.display import Bar, Measured
from flatbench.optim import moments
from flatbench.report.html import html_table
from flatbench.store import digest
from flatbench.store.files import file_digest, read_json, write_json
from flatbench.subject.objective import rows
from flatbench.subject.subject import LossFunction, Subject
from flatbench.version import __version__

SPLIT = "train"


@dataclass(frozen=True)
class Checkpoint:
    """A model at its trained point, with data and loss.

    Nothing that is asked of it changes the model: parameters, buffers, modes, ``requires_grad``, gradients
    and the random state are afterwards what they were before.

    Attributes:
        model: peft-wrapped if it has an adapter.
        data: split -> batches; the first split is what sharpness is measured on.
        loss: (model, batch) -> (mean loss, number of terms it is the mean of).
        metric: (logits, labels) -> figures by name, or None.
        adapted: names, in the base model, of the modules whose weights span the ``merged`` space.
        seed: of the probes (random directions, start vectors).
        metadata: where it comes from.
        training: what was recorded while it was trained, if flatbench trained it.
        taken: what was taken of each split of the data, and what the loss is a mean over; empty for a run.
        loss_key: digest of the loss; empty for a run's, which its data and weights tell.
        optimizer_file: what transformers' Trainer saved of its optimizer beside the weights; None without.
    """

    model: nn.Module
    data: Mapping[str, Sequence[Batch]]
    loss: LossFunction
    metric: LogitsFunction | None
    adapted: Sequence[str]
    seed: int
    metadata: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)
    loss_key: str = ""
    optimizer_file: Path | None = None

    # -- what it is ---------------------------------------------------------------------------------------

    @property
    def space(self) -> NamedSpace:
        """What is measured unless another is named: ``merged``, or ``all`` where nothing is adapted."""
        return "merged" if self.adapted else "all"

    def subject(self, split: str | None = None) -> Subject:
        """The checkpoint as measures take it. Raises InputError if it has no data, or not this split."""
        if not self.data:
            raise InputError("this checkpoint has no data; open it with data=")
        name = next(iter(self.data)) if split is None else split
        if name not in self.data:
            raise InputError(f"no split '{name}'; there are {', '.join(self.data)}")
        saved, others = self.optimizer_file, [split for split in self.data if split != name]
        return Subject(
            self.model,
            self.data[name],
            self.loss,
            self.adapted,
            self.seed,
            self.training,
            optimizer_state=None if saved is None else partial(moments.of_checkpoint, saved, self.model),
            others={split: partial(self.data.__getitem__, split) for split in others},
        )

    @functools.cached_property
    def _contents(self) -> dict[str, str]:
        """Digests of the data; the weights' is taken anew each time, for a live model may train on."""
        return {split: data_digest(batches) for split, batches in self.data.items()}

    def _more_of_the_key(self) -> dict[str, str]:
        """What beside weights and data decides a number: the loss, and buffers (running means)."""
        buffers = {name: b for name, b in self.model.named_buffers() if b.layout == torch.strided}
        more = {"loss": self.loss_key, "buffers": data_digest([buffers])} if self.loss_key else {}
        more["function"] = self._function()
        # what was kept of a model in half precision before it was measured in float32 is not that
        return {**more, "computed_in": "float32"} if half_types(self.model) else more

    def _function(self) -> str:
        """What tells models of equal weights apart: layers, adapters and their settings, and a loss.

        The loss of a few rows knows the rest: an attribute that `forward` reads, or its code. Six digits,
        since the last ones depend on threads.
        """
        batches = next(iter(self.data.values()), None)
        with as_found(self.model), torch.no_grad(), losses_in_float32(self.model):
            found = self.loss(self.model, sample_of(batches[0]))[0] if batches else torch.tensor(0.0)
        scales = {
            name: {adapter: float(scale) for adapter, scale in module.scaling.items()}
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "scaling", None), dict)
        }
        active = str(getattr(self.model, "active_adapters", ""))
        return digest([repr(self.model), scales, active, f"{float(found):.6g}"])

    def _key_of_directions(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What decides a number of a measure along an update: the optimizer's state, and other data."""
        more: dict[str, Any] = {"others": self._contents} if "against" in options else {}
        if options.get("direction", "gradient") != "gradient" and self.optimizer_file is not None:
            more["optimizer"] = file_digest(self.optimizer_file)
        return more

    # -- what is asked of it ------------------------------------------------------------------------------

    def measure(
        self, name: str, *, split: str | None = None, cached: bool = True, **options: Any
    ) -> Measured:
        """Take a measure of `flatbench list` with its options.

        Args:
            split: the data to measure on; the first one if None.
            cached: take what was found before for the same weights, data and options.

        Raises:
            InputError: unknown measure, options that make no sense, no data.
            NotApplicableError: the measure has no meaning for this model.
        """
        kind = measures.REGISTRY.load(name)
        if "space" in measures.REGISTRY.options(name).model_fields:
            options.setdefault("space", self.space)
        taken = kind(**options)
        subject = self.subject(split)
        key = digest(
            {
                "version": __version__,
                "measure": name,
                "options": json.loads(json.dumps(options, default=repr)),
                "weights": weights.digest(self.model),
                "adapted": list(self.adapted),
                "data": self._contents[next(iter(self.data)) if split is None else split],
                "seed": self.seed,
                "training": dict(self.training),
                **self._more_of_the_key(),
                **self._key_of_directions(options),
            }
        )
        path = cache.folder() / "measures" / f"{name}-{key[:24]}.json"
        if cached and path.is_file():
            return Measured(name, read_json(path), True)
        values = taken(subject)
        if cached:
            write_json(path, values)
        return Measured(name, values, False)

    def hessian(self, k: int = 1, **options: Any) -> Measured:
        """The ``k`` largest eigenvalues of the loss's Hessian, with error bounds: the measure `hessian`."""
        return self.measure("hessian", k=k, **options)

    def sharpness(self, kind: str = "sam", **options: Any) -> Measured:
        """How far the loss rises nearby.

        Args:
            kind: ``sam`` (the measure `sam_sharpness`), or ``worst`` or ``average`` case (the measure
                `sharpness`, whose ``rho`` may be one radius or several).
            options: of the measure.
        """
        if kind not in ("worst", "average"):
            return self.measure(f"{kind}_sharpness", **options)
        if isinstance(options.get("rho"), int | float):
            options["rho"] = [options["rho"]]
        return self.measure("sharpness", kind=kind, **options)

    def cost(self) -> Measured:
        """What training cost, if flatbench trained the checkpoint; NotApplicableError else."""
        if not self.training:
            raise NotApplicableError("no training was recorded for this checkpoint")
        return Measured("cost", measures.REGISTRY.load("cost")()(self.subject()), False)

    def landscape(
        self,
        along: Any = "random",
        *,
        splits: Sequence[str] | None = None,
        functions: Sequence[LogitsFunction] | None = None,
        cached: bool = True,
        progress: bool | None = None,
        **options: Any,
    ) -> Landscape:
        """Slices or a plane of loss and metric through the weights; see `flatbench.landscape.landscape`.

        Args:
            along: ``random``, ``hessian``, ``gradient``; another `Checkpoint` for the line to it; a sequence
                of earlier checkpoints for the plane of the trajectory; two of these for a plane over both.
            splits: all of them if None.
            functions: of logits and labels; the checkpoint's metric if None.
            cached: keep the points on disk by their content: the same request again is free, and an
                interrupted one goes on.
            progress: show a bar; in notebooks and on terminals if None.
            options: dims, space, normalisation, distance, points, draws, only, examples, adaptive, stack,
                seed, precision.
        """
        self.subject()
        chosen = {s: self.subject(s).batches for s in splits} if splits else dict(self.data)
        if functions is None:
            functions = [] if self.metric is None else [self.metric]
        options.setdefault("space", self.space)
        ask = functools.partial(
            landscape, self.subject(), _along(along), data=chosen, functions=functions, **options
        )
        with Bar(progress) as bar:
            return ask(stream=self._place if cached else None, progress=bar.show)

    def _place(self, key: str) -> Path:
        more = self._more_of_the_key()
        whole = digest([key, more]) if more else key
        return cache.folder() / "landscapes" / f"{whole[:24]}.jsonl"

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Split -> loss and metric at the checkpoint, in the precision in which it is stored."""
        functions = [] if self.metric is None else [self.metric]
        found = landscape(
            self.subject(),
            "random",
            space=self.space,
            points=3,
            data=self.data,
            functions=functions,
            precision="as_stored",
        )
        origin: dict[str, dict[str, float]] = found.meta["origin"]
        return origin

    # -- how it is shown ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """What a person wants to know about it, name -> text."""
        parameters = sum(p.numel() for p in self.model.parameters())
        data = ", ".join(f"{split} {sum(map(rows, batches))}" for split, batches in self.data.items())
        return {
            **{key: str(value) for key, value in self.metadata.items() if value is not None},
            "parameters": f"{parameters:,}",
            "adapted modules": str(len(self.adapted)),
            "examples": data or "none",
            **self.taken,
        }

    def __repr__(self) -> str:
        return f"Checkpoint({', '.join(f'{key}={value}' for key, value in self.describe().items())})"

    def _repr_html_(self) -> str:
        return html_table(self.describe(), "Checkpoint")


def _along(along: Any) -> Any:
    """Checkpoints made into axes: one into a line, a sequence into a trajectory."""
    if isinstance(along, str | Axes):
        return along
    if isinstance(along, Checkpoint):
        return Line(along.subject(), str(along.metadata.get("name", "the other checkpoint")))
    listed = list(along)
    if listed and all(isinstance(one, Checkpoint) for one in listed):
        return Trajectory([one.subject() for one in listed])
    return [_along(one) for one in listed]
