"""The study file as a person writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from flatbench.config.registry import LATER, Options
from flatbench.config.sections import TrainOptions
from flatbench.study.methods import Grid, Name

Seed = Annotated[int, Field(ge=0)]


class Tune(Options):
    """The ``tune:`` section: how hyper-parameters are chosen, on validation data only.

    Attributes:
        grid: values to try by option name, for every method; a method's own ``grid`` replaces it key by key.
        metric: validation metric that decides, larger is better; the task's main metric if not given.
        seeds: seeds of the tuning runs, none of which may be a final seed.
        trials: configurations that every method tries; drawn at random from larger grids.
    """

    grid: Grid = {}
    metric: str | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    trials: Annotated[int, Field(ge=1)] | None = None


class StudyFile(Options):
    """A study file as a person writes it.

    Attributes:
        cost: ``paired`` times every final run's method beside plain LoRA, as the measure ``cost`` with
            ``paired: true`` does.
        after: a study that is run first, into the same folder: each method's adapter starts from what the
            method of that name trained there with the first of its seeds, as ``adapter.init_from`` would say.
    """

    name: Name
    description: str = ""
    variables: dict[str, str | None] = {}
    task: str | dict[str, Any]
    model: dict[str, Any] = {}
    adapter: str | dict[str, Any] = "lora"
    methods: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    train: TrainOptions = TrainOptions()
    tune: Tune | None = None
    grid: Grid = {}
    measures: list[str | dict[str, Any]] = []
    cost: Annotated[Literal["recorded", "paired"], LATER] = "recorded"
    after: Annotated[str | None, LATER] = None
