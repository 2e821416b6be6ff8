"""Plan a study's runs, and select each method's hyper-parameters for its final runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.config.validation import validated
from flatbench.errors import InputError, shown
from flatbench.store import StudyFolder
from flatbench.store import notes as data_notes
from flatbench.study.earlier import trained_adapter
from flatbench.study.methods import Method
from flatbench.study.run import Run
from flatbench.study.study import Condition, Study


@dataclass(frozen=True)
class Row:
    """A run in a list. Attributes: its id, or "" where its data are not there to hash; its state."""

    id: str
    stage: str
    condition: str
    method: str
    seed: int
    hyper: Mapping[str, Any]
    state: str


def sketch(study: Study, folder: StudyFolder) -> tuple[list[Row], int]:
    """A study's runs without its data: those that can be told now, and how many final ones cannot.

    What was run before is found by its configuration.
    """
    states = _states_by_configuration(folder)
    tune, rows, waiting = study.file.tune, [], 0
    for condition in study.conditions:
        for method in condition.methods:
            stage, seeds = ("final", study.file.seeds) if tune is None else ("tune", tune.seeds)
            waiting += 0 if tune is None else len(study.file.seeds)
            for choice in condition.trials[method.name]:
                for seed in seeds:
                    config = _config(condition, condition.configured(method, choice), seed, stage)
                    run, state = states.get(_plain_text(config), ("", "planned"))
                    hyper = {"lr": config["train"]["lr"], **choice}
                    rows.append(Row(run, stage, condition.label, method.name, seed, hyper, state))
    return rows, waiting


def _states_by_configuration(folder: StudyFolder) -> dict[str, tuple[str, str]]:
    found = {}
    for directory in folder.directories() if folder.file.is_file() else ():
        config = {k: v for k, v in directory.spec()["config"].items() if k != "adapter_start"}
        found[_plain_text(config)] = (directory.path.name, directory.state())
    return found


def _plain_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _config(condition: Condition, configured: Method, seed: int, stage: str) -> dict[str, Any]:
    """A run's configuration, but for what it starts from."""
    return {
        "task": condition.task,
        "model": condition.model,
        "adapter": configured.adapter.model_dump(mode="json"),
        "optimizer": configured.optimizer,
        "train": configured.train.model_dump(mode="json"),
        "seed": seed,
        "stage": stage,
    }


def _size_notes(task: Any) -> list[str]:
    """What is to be said of the size of a task's pretrained model."""
    from flatbench.models import pretrained  # loads torch, as the task has done by now

    model = getattr(task, "model", None)
    found = pretrained.size_note(model) if isinstance(model, pretrained.PretrainedModel) else None
    return [] if found is None else [found]


class Plan:
    """A study's runs over the results that are there already.

    Raises InputError when a task's data or model is missing.
    """

    def __init__(self, study: Study, folder: StudyFolder) -> None:
        self.study = study
        self.folder = folder
        self._starts: dict[str, str] = {}
        #: (condition, method, stage, choice) -> configuration but for its seed, and hyper-parameters
        self._configurations: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
        #: method -> the adapter that it starts from, of a study that is run before
        self._earlier: dict[str, Path | None] = {}
        #: what is known before anything is trained of data that is wrong or short of what was asked for
        self.notes: list[str] = []
        self._tasks = {c.label: self._load_task(c) for c in study.conditions}

    def _load_task(self, condition: Condition) -> tuple[str, str, str]:
        """Main metric, data fingerprint, and the validation metric that chooses."""
        try:
            task = tasks.load(condition.task, condition.model)
            if not all(
                method.adapter.target_modules or method.adapter.target for method in condition.methods
            ):
                _ = task.target_modules  # the task says here, not in the midst of a run, if it knows none
            if any(method.train.group_by_length for method in condition.methods):
                from flatbench.training.batches import (
                    check_lengths,  # loads torch, as the task has done by now
                )

                check_lengths(task)
            if not type(task).__module__.startswith("flatbench."):
                from flatbench.tasks.common.split_check import check_splits

                check_splits(task, self.study.file.seeds[0])
            metric, data = str(task.metric), str(task.fingerprint())
            short = data_notes.notes({**task.overview(), "fewer_than_shots": task.shortages()})
        except InputError as error:
            raise InputError(f"{self._place(condition)}: {shown(error, 2000)}") from error
        self.notes += [f"{condition.label}: {note}" if condition.label else note for note in short]
        self.notes += [note for note in _size_notes(task) if note not in self.notes]
        chooses = self.study.file.tune.metric if self.study.file.tune else None
        known = [*task.validation_metrics, "loss"]
        if chooses is not None and chooses not in known:
            raise InputError(
                f"{self._place(condition)}: tune.metric: the task has no metric '{chooses}' on validation "
                f"data; it has {', '.join(known)}"
            )
        return metric, data, str(chooses or task.tuning_metric or metric)

    def _place(self, condition: Condition) -> str:
        """File, condition and task, for messages."""
        where = f"condition {condition.label}: " if condition.label else ""
        return f"{self.study.source}: {where}task: {condition.task['name']}"

    def _run(
        self, condition: Condition, method: Method, choice: Mapping[str, Any], seed: int, stage: str
    ) -> Run:
        metric, data, chosen_by = self._tasks[condition.label]
        key = (condition.label, method.name, stage, json.dumps(choice, sort_keys=True))
        if key not in self._configurations:
            # seeds have all but the seed in common, in memory too
            configured = self._with_start(condition.configured(method, choice))
            start = self._start(condition, configured.adapter)
            config = {
                **_config(condition, configured, 0, stage),
                **({"adapter_start": start} if start else {}),
                **self._waits_for(configured),
            }
            self._configurations[key] = config, {"lr": configured.train.lr, **choice}
        config, hyper = self._configurations[key]
        return Run(
            study=self.study.name,
            condition=condition.label,
            method=method.name,
            metric=metric,
            chosen_by=chosen_by,
            hyper=hyper,
            config={**config, "seed": seed},
            data=data,
            measures=self.study.measures if stage == "final" else {},
        )

    def _start(self, condition: Condition, adapter: AdapterOptions) -> str | None:
        """Digest of the adapter that a run starts from, read once; a part of the run's identity."""
        if adapter.init_from is None:
            return None
        key = adapter.model_dump_json()
        if key not in self._starts:
            from flatbench.models.adapt import start_digest  # loads torch, as the task has done by now

            try:
                self._starts[key] = str(start_digest(adapter))
            except InputError as error:
                raise InputError(f"{self._place(condition)}: {error}") from error
        return self._starts[key]

    def _with_start(self, method: Method) -> Method:
        """The method with the adapter that its study starts from, where that is trained by now."""
        after, adapter = self.study.file.after, method.adapter
        if after is None or adapter.name == "none" or adapter.init_from is not None:
            return method
        if method.name not in self._earlier:
            results = self.folder.path.parent
            self._earlier[method.name] = trained_adapter(results, after, method.name, self.study.source)
        path = self._earlier[method.name]
        if path is None:
            return method
        options = {**adapter.model_dump(), "init_from": str(path)}
        return method.model_copy(
            update={"adapter": validated(AdapterOptions, options, self.study.source, "after")}
        )

    def _waits_for(self, method: Method) -> dict[str, str]:
        """Marks a run whose start is not trained yet: it can be counted, and is another one afterwards."""
        after, adapter = self.study.file.after, method.adapter
        waits = after is not None and adapter.name != "none" and adapter.init_from is None
        return {"waits_for": str(after)} if waits else {}

    @cached_property
    def tuning(self) -> list[Run]:
        """Every tuning run: each method's trials on the tuning seeds; none if the study tunes nothing."""
        tune = self.study.file.tune
        if tune is None:
            return []
        return [
            self._run(condition, method, choice, seed, "tune")
            for condition in self.study.conditions
            for method in condition.methods
            for choice in condition.trials[method.name]
            for seed in tune.seeds
        ]

    def selection(self) -> list[dict[str, Any]]:
        """One entry a (condition, method, trial): its validation score, and whether it was chosen.

        A method is decided once none of its tuning runs is outstanding. The score is the mean of the
        validation metric (the largest is the best, of ``loss`` the smallest) over the tuning seeds; a trial
        with a failed seed has none and cannot win; of equal scores the first in the grid's order wins.
        """
        tune = self.study.file.tune
        entries: list[dict[str, Any]] = []
        if tune is None:
            return entries
        for condition in self.study.conditions:
            metric = self._tasks[condition.label][2]
            for method in condition.methods:
                trials = []
                for choice in condition.trials[method.name]:
                    runs = [self._run(condition, method, choice, seed, "tune") for seed in tune.seeds]
                    trials.append({"choice": choice, **self._score(runs, metric)})
                decided = not any(trial["outstanding"] for trial in trials)
                scored = [trial for trial in trials if trial["score"] is not None]
                pick = min if metric == "loss" else max
                best = pick(scored, key=lambda trial: trial["score"]) if decided and scored else None
                entries += [
                    {"condition": condition.label, "method": method.name, **t, "chosen": t is best}
                    for t in trials
                ]
        return entries

    def _score(self, runs: Sequence[Run], metric: str) -> dict[str, Any]:
        scores: list[float] = []
        outstanding, failed = 0, 0
        for run in runs:
            directory = self.folder.run(run.id)
            state = directory.state()
            if state in ("failed", "diverged"):
                failed += 1
            elif state == "damaged" or (result := directory.result()) is None:
                outstanding += 1
            else:
                score = result["metrics"]["validation"].get(metric)
                if score is None:
                    failed += 1  # an undefined metric (a correlation of constant predictions) cannot win
                else:
                    scores.append(score)
        complete = not outstanding and not failed
        return {
            "score": mean(scores) if complete else None,
            "runs": [run.id for run in runs],
            "outstanding": outstanding,
            "failed": failed,
        }

    def final(self, selection: Sequence[Mapping[str, Any]]) -> list[Run]:
        """The final runs that can be made now: of every method whose hyper-parameters are chosen."""
        if self.study.file.tune is None:
            chosen = [
                (c.label, m.name, choice)
                for c in self.study.conditions
                for m in c.methods
                for choice in c.trials[m.name]
            ]
        else:
            chosen = [(e["condition"], e["method"], e["choice"]) for e in selection if e["chosen"]]
        conditions = {condition.label: condition for condition in self.study.conditions}
        runs = []
        for label, name, choice in chosen:
            condition = conditions[label]
            method = next(m for m in condition.methods if m.name == name)
            runs += [self._run(condition, method, choice, seed, "final") for seed in self.study.file.seeds]
        return runs

    def snapshot(self) -> dict[str, Any]:
        """The content of study.json: all that a report needs to know beside the run directories."""
        selection = self.selection()
        runs = [*self.tuning, *self.final(selection)]
        tune = self.study.file.tune
        methods = self.study.conditions[0].methods
        return {
            "study": self.study.file.model_dump(mode="json"),
            "methods": [method.name for method in methods],
            "conditions": [condition.label for condition in self.study.conditions],
            "tasks": {condition.label: condition.task for condition in self.study.conditions},
            "models": {condition.label: condition.model for condition in self.study.conditions},
            "seeds": list(self.study.file.seeds),
            "budget": {
                method.name: {
                    "trials": len(self.study.conditions[0].trials[method.name]),
                    "tuning_seeds": list(tune.seeds) if tune else [],
                    "grid": {**(tune.grid if tune else {}), **method.grid},
                }
                for method in methods
            },
            "selection": selection,
            "measures": self.study.measures,
            "runs": [run.labels() for run in runs],
        }
