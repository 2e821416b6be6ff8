"""Grids of hyper-parameters: products, draws, and the same budget for every method."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flatbench.errors import InputError, shown
from flatbench.seeding import derive_seed
from flatbench.study.methods import Method, canonical, with_choice
from flatbench.study.schema import Tune


def tuning_trials(method: Method, index: int, tune: Tune | None, source: str) -> list[dict[str, Any]]:
    """Configurations for a method to try: its grid, or draws from it. Raises InputError for a bad grid."""
    where = f"methods[{index}] ({method.name})"
    shared = canonical(method, tune.grid if tune else {}, source, "tune.grid")
    grid = {**shared, **canonical(method, method.grid, source, f"{where}.grid")}
    if tune and "lr" not in grid:
        raise InputError(
            f"{source}: {where}: tune.grid must hold 'lr': the learning rate matters more than the method "
            "(arXiv 2602.04998), so each method gets its own"
        )
    choices = grid_product(grid, source, f"{where}.grid")
    seen: set[str] = set()
    for choice in choices:
        configured = with_choice(method, choice, source, f"{where}.grid").model_dump_json()
        if configured in seen:
            raise InputError(
                f"{source}: {where}.grid: {shown(one_line_text(choice))} is tried twice; each configuration "
                "counts once in a budget"
            )
        seen.add(configured)
    if tune and tune.trials and len(choices) > tune.trials:
        # every method draws with the same stream, so equal grids give equal draws
        drawn = random.Random(derive_seed(0, "trials")).sample(range(len(choices)), tune.trials)
        choices = [choices[i] for i in sorted(drawn)]
    if tune and tune.trials and len(choices) < tune.trials:
        raise InputError(
            f"{source}: {where}: its grid has {len(choices)} configurations, but tune.trials "
            f"asks for {tune.trials} of every method; add values"
        )
    return choices


def check_equal_budget(trials: Mapping[str, Sequence[Any]], source: str) -> None:
    """Raise InputError where methods would try different numbers of configurations."""
    sizes = {name: len(choices) for name, choices in trials.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"{source}: tune.grid: methods would try different numbers of configurations ({listed}); "
            "make the grids equally large, or set tune.trials"
        )


#: conditions of a study, or configurations of a method: a few short lists multiply to more than any memory
LARGEST_GRID = 100_000


def grid_product(grid: Mapping[str, Sequence[Any]], source: str, where: str) -> list[dict[str, Any]]:
    """Every combination of a grid's values. Raises InputError for more than `LARGEST_GRID`."""
    size = math.prod(map(len, grid.values()))
    if size > LARGEST_GRID:
        raise InputError(f"{source}: {where}: {size} combinations; {LARGEST_GRID} are the most")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def one_line_text(value: Any) -> str:
    """A value as a person writes it, whole, so that different values have different texts."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
