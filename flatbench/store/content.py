"""The content of a study.json, checked where nothing else vouches for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flatbench.errors import shown


class _Named(BaseModel):
    name: str


class _Budget(BaseModel):
    trials: int | None
    tuning_seeds: list[int]


class _Choice(BaseModel):
    condition: str
    method: str
    choice: dict[str, Any]
    score: float | None
    chosen: bool
    outstanding: int
    runs: list[str]


class _Content(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    study: _Named
    methods: list[str]
    conditions: list[str]
    tasks: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    seeds: list[int]
    budget: dict[str, _Budget]
    selection: list[_Choice]
    measures: dict[str, dict[str, Any]] = {}
    runs: list[Any]  # `StudyFolder.places` looks at them
    lost: list[str] = []

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for whole, part, names in (
            ("budget", self.budget, self.methods),
            ("tasks", self.tasks or self.conditions, self.conditions),  # early versions wrote no tasks
        ):
            for name in names:
                if name not in part:
                    raise PydanticCustomError(
                        "missing", "{whole} say nothing of '{name}'", {"whole": whole, "name": name}
                    )
        return self


def tied(entry: Mapping[str, Any], selection: Iterable[Mapping[str, Any]]) -> int:
    """How many trials of a method in a condition have the validation score of this one, itself included."""
    place = ("condition", "method", "score")
    return sum(all(other[key] == entry[key] for key in place) for other in selection)


def problem(content: Any) -> str:
    """What is wrong with a study.json's content, in a few words; empty where nothing is."""
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        return shown(": ".join([*(".".join(map(str, first["loc"])),) * bool(first["loc"]), message]), 200)
    return ""
