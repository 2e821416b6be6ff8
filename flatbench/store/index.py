"""study.json made from the run directories alone, where it got lost and the study file is not at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from flatbench.errors import InputError
from flatbench.store.run_directory import RunDirectory


def rebuilt(study: str, runs: Path) -> dict[str, Any] | None:
    """The content of study.json as far as the run directories tell it, with ``"rebuilt": true``.

    What a study file says beyond its runs (its order, its description, that two places share one run) is
    lost: methods, conditions and runs are in alphabetical order.

    Args:
        study: the study's name.
        runs: the folder of its run directories.

    Returns None if there are no run directories. Those whose run.json is damaged are listed under ``lost``.
    """
    directories = [RunDirectory(file.parent) for file in sorted(runs.glob("*/run.json"))]
    found, lost = [], []
    for directory in directories:
        try:
            found.append(_place(directory))
        except InputError as error:
            lost.append(str(error))
    if lost and not found:
        raise InputError(lost[0])
    if not found:
        return None
    places = sorted(found, key=_order)
    specs = [place.pop("spec") for place in places]
    final = [spec for spec in specs if spec["config"]["stage"] == "final"]
    tuning = [spec for spec in specs if spec["config"]["stage"] == "tune"]
    selection = _selection(places, specs, runs) if tuning else []
    conditions = _distinct(place["condition"] for place in places)
    one_of = {spec["condition"]: spec for spec in specs}
    tuning_seeds = sorted({spec["config"]["seed"] for spec in tuning})
    tune: dict[str, Any] = {"grid": {}, "seeds": tuning_seeds, "metric": None, "trials": None}
    return {
        "study": {"name": study, "description": "", "tune": tune if tuning else None},
        "methods": _distinct(place["method"] for place in places),
        "conditions": conditions,
        "tasks": {condition: one_of[condition]["config"]["task"] for condition in conditions},
        "models": {condition: one_of[condition]["config"]["model"] for condition in conditions},
        "seeds": sorted({spec["config"]["seed"] for spec in final}),
        "budget": {
            method: _budget([spec for spec in tuning or final if spec["method"] == method], tuning_seeds)
            for method in _distinct(place["method"] for place in places)
        },
        "selection": selection,
        "measures": {label: config for spec in final for label, config in spec["measures"].items()},
        "runs": places,
        "rebuilt": True,
        "lost": lost,
    }


def _place(directory: RunDirectory) -> dict[str, Any]:
    spec = directory.spec()
    try:
        labels = {key: spec[key] for key in ("condition", "method", "hyper")}
        return {"id": directory.id, "stage": spec["config"]["stage"], **labels, "spec": spec}
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory.path / 'run.json'}: damaged ({error!r} is missing)") from None


def _order(place: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tuning runs first; then by condition, method, hyper-parameters and seed."""
    hyper = [(key, str(type(value)), value) for key, value in sorted(place["hyper"].items())]
    tuned = place["stage"] == "tune"
    return not tuned, place["condition"], place["method"], json.dumps(hyper), place["spec"]["config"]["seed"]


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _budget(specs: Sequence[Mapping[str, Any]], tuning_seeds: Sequence[int]) -> dict[str, Any]:
    trials = {json.dumps(spec["hyper"], sort_keys=True): spec["hyper"] for spec in specs}
    keys = sorted({key for hyper in trials.values() for key in hyper})
    values = {key: {json.dumps(hyper.get(key)): hyper.get(key) for hyper in trials.values()} for key in keys}
    grid = {key: list(found.values()) for key, found in values.items() if len(found) > 1}
    return {"trials": len(trials), "tuning_seeds": list(tuning_seeds), "grid": grid}


def _selection(
    places: Sequence[Mapping[str, Any]], specs: Sequence[Mapping[str, Any]], runs: Path
) -> list[dict[str, Any]]:
    """An entry a trial; chosen is the one whose hyper-parameters the method's final runs have."""

    def trial(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[str, str, str]:
        place = pair[0]
        return place["condition"], place["method"], json.dumps(place["hyper"], sort_keys=True)

    pairs = list(zip(places, specs, strict=True))
    chosen = {trial(pair) for pair in pairs if pair[0]["stage"] == "final"}
    entries = []
    for key, group in groupby([pair for pair in pairs if pair[0]["stage"] == "tune"], key=trial):
        own = list(group)
        metric = own[0][1].get("chosen_by", own[0][1]["metric"])
        directories = [RunDirectory(runs / place["id"]) for place, _ in own]
        states = [directory.state() for directory in directories]
        lost = sum(state in ("failed", "diverged", "damaged") for state in states)
        sound = [one for one, state in zip(directories, states, strict=True) if state != "damaged"]
        results = [result for directory in sound if (result := directory.result()) is not None]
        scores = [result["metrics"]["validation"].get(metric) for result in results]
        whole = len(scores) == len(own) and None not in scores and not lost
        entries.append(
            {
                "condition": key[0],
                "method": key[1],
                "choice": own[0][0]["hyper"],
                "score": mean(scores) if whole else None,
                "runs": [place["id"] for place, _ in own],
                "outstanding": len(own) - len(results) - lost,
                "failed": lost + scores.count(None),
                "chosen": key in chosen,
            }
        )
    return entries
