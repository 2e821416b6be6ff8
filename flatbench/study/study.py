"""A study's sections resolved into conditions and methods with a fair budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flatbench import measures, optim, tasks
from flatbench.config.registry import Options
from flatbench.config.sections import TrainOptions
from flatbench.config.validation import as_mapping, plugin, validated
from flatbench.errors import InputError, shown
from flatbench.study import compatibility
from flatbench.study.grids import check_equal_budget, grid_product, one_line_text, tuning_trials
from flatbench.study.methods import Method, resolve_method, with_choice
from flatbench.study.schema import StudyFile


class Study:
    """A validated study: everything resolved except which hyper-parameters win.

    Attributes:
        file: the validated sections.
        source: the file's name, for messages.
        measures: label -> {"name": …, options}.
    """

    def __init__(self, content: Mapping[str, Any], source: str) -> None:
        self.source = source
        self.file: StudyFile = validated(StudyFile, content, source)
        self._check_seeds()
        entries = self.file.measures
        self.measures = _measures(
            _with_paired_cost(entries) if self.file.cost == "paired" else entries, source
        )
        self.conditions = [self._condition(choice, label) for choice, label in self._settings()]
        for label, count in Counter(condition.label for condition in self.conditions).items():
            if count > 1:
                raise InputError(f"{source}: grid: the condition {shown(label)} stands in it twice")

    @property
    def name(self) -> str:
        """The study's name, which names its folders too."""
        return self.file.name

    def _check_seeds(self) -> None:
        seeds = self.file.seeds
        tuning = self.file.tune.seeds if self.file.tune else []
        for where, given in (("seeds", seeds), ("tune.seeds", tuning)):
            if len(set(given)) < len(given):
                raise InputError(f"{self.source}: {where}: the same seed twice")
        shared = set(seeds) & set(tuning)
        if shared:
            raise InputError(
                f"{self.source}: tune.seeds: {sorted(shared)} are final seeds too; choose others, or "
                "the final runs would repeat what was selected for"
            )

    def _settings(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The grid's choices and their labels. A key may name several options, which change together."""
        for choice in grid_product(self.file.grid, self.source, "grid"):
            setting: dict[str, Any] = {}
            telling: list[str] = []
            for key, value in choice.items():
                where = f"{self.source}: grid.{shown(key)}"
                options = [option.strip() for option in key.split(",")]
                values = value if len(options) > 1 else [value]
                if not isinstance(values, list) or len(values) != len(options):
                    raise InputError(
                        f"{where}: {len(options)} options need a list of as many values, not "
                        f"{shown(one_line_text(value))}"
                    )
                for option, own in zip(options, values, strict=True):
                    if option in setting:
                        raise InputError(f"{where}: '{shown(option)}' stands in the grid twice")
                    setting[option] = own
                telling += options[: _informative_count(self.file.grid[key])]
            yield setting, ", ".join(f"{option}={one_line_text(setting[option])}" for option in telling)

    def _condition(self, choice: Mapping[str, Any], label: str) -> Condition:
        content: dict[str, Any] = self.file.model_dump()
        for key, value in choice.items():
            section, dot, option = key.partition(".")
            if section not in ("task", "model", "adapter", "train"):
                raise InputError(
                    f"{self.source}: grid.{shown(key)}: name a section first: task.…, model.…, adapter.… or "
                    "train.…"
                )
            if not dot:
                content[section] = value
            else:
                content[section] = {**as_mapping(content[section], self.source, section), option: value}
        return Condition(self, label, content)


class Condition:
    """One setting of a study (task, model, training) in which its methods are compared.

    Attributes:
        label: "" if the study has one condition, else what sets it apart, as "task.label_noise=0.2"; of
            options that change together, as many of the first as tell the conditions apart.
        task: {"name": …, options}; model: the task's model options.
        methods: the methods, resolved for this condition.
        trials: method name -> the hyper-parameter choices that it tries.
    """

    def __init__(self, study: Study, label: str, content: Mapping[str, Any]) -> None:
        source = study.source
        self.label = label
        self.task, self.model = _task(content, source)
        train = validated(TrainOptions, content["train"], source, "train")
        entries = enumerate(study.file.methods)
        self.methods = [resolve_method(entry, i, content["adapter"], train, source) for i, entry in entries]
        for i, method in enumerate(self.methods):
            compatibility.check(self.model, method, study.measures, source, f"methods[{i}] ({method.name})")
        for name, count in Counter(method.name for method in self.methods).items():
            if count > 1:
                raise InputError(
                    f"{source}: methods: two methods are called '{name}'; give each its own name"
                )
        self.trials = {
            method.name: tuning_trials(method, i, study.file.tune, source)
            for i, method in enumerate(self.methods)
        }
        if study.file.tune:
            check_equal_budget(self.trials, source)

    def options(self) -> Iterator[tuple[Options, str]]:
        """The checked options of every plug-in here, with the place in the file that each is from."""
        yield _validate(tasks.model_options(self.task["name"]), self.model), "model"
        # the model is a section of its own in the file, and an option of the task in the code
        options = tasks.REGISTRY.options(self.task["name"])
        yield (
            _validate(options, {**self.task, "model": self.model}).model_copy(update={"model": None}),
            "task",
        )
        for i, method in enumerate(self.methods):
            optimizer = optim.REGISTRY.options(method.optimizer["name"])
            yield _validate(optimizer, method.optimizer), f"methods[{i}].optimizer"
            yield method.adapter, f"methods[{i}].adapter"
            for choice in self.trials[method.name]:
                if "adapter.init_from" in choice:
                    yield self.configured(method, choice).adapter, f"methods[{i}].grid.adapter"

    def configured(self, method: Method, choice: Mapping[str, Any]) -> Method:
        """The method with the hyper-parameters of one trial put in."""
        return with_choice(method, choice, "", "")


def _informative_count(values: Sequence[Any]) -> int:
    """How many of the options that change together tell the entries apart, from the first one on."""
    widths = {len(value) if isinstance(value, list) else 1 for value in values}
    whole = min(widths)
    for count in range(1, whole):
        if len({one_line_text(value[:count]) for value in values}) == len(values):
            return count
    return whole


def _validate(model: type[Options], content: Mapping[str, Any]) -> Options:
    return model.model_validate({key: value for key, value in content.items() if key in model.model_fields})


def _task(content: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = as_mapping(content["task"], source, "task")
    if "model" in raw:
        raise InputError(f"{source}: task.model: unknown key; the model is a section of its own, 'model:'")
    name = raw.get("name")
    if isinstance(name, str) and name in tasks.REGISTRY:
        model = validated(tasks.model_options(name), content["model"], source, "model").model_dump(
            mode="json"
        )
        raw = {**raw, "model": model}
    name, options = plugin(tasks.REGISTRY, raw, source, "task")
    model = options.pop("model")
    return {"name": name, **options}, model


def _measures(entries: Sequence[str | Mapping[str, Any]], source: str) -> dict[str, dict[str, Any]]:
    """Label -> resolved measure. The label is the name, with the space where there is one."""
    found: dict[str, dict[str, Any]] = {}
    for i, entry in enumerate(entries):
        label, measure = resolve_measure(entry, source, f"measures[{i}]")
        if label in found:
            raise InputError(f"{source}: measures[{i}]: '{label}' is measured twice; add 'label: …' to one")
        found[label] = measure
    return found


def _with_paired_cost(entries: Sequence[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
    """The measures with every ``cost`` paired unless it says else; with one where there is none."""
    found: list[str | dict[str, Any]] = []
    for entry in entries:
        raw = {"name": entry} if isinstance(entry, str) else entry
        found.append({"paired": True, **raw} if raw.get("name") == "cost" else entry)
    if not any(isinstance(entry, dict) and entry.get("name") == "cost" for entry in found):
        found.append({"name": "cost", "paired": True})
    return found


def resolve_measure(entry: str | Mapping[str, Any], source: str, where: str) -> tuple[str, dict[str, Any]]:
    """Label and checked options of one measure. Raises InputError naming ``source`` and ``where``."""
    raw = dict(as_mapping(entry, source, where))
    label = raw.pop("label", None)
    name, options = plugin(measures.REGISTRY, raw, source, where)
    if label is None:
        label = f"{name}_{options['space']}" if "space" in options else name
    if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", label):
        raise InputError(f"{source}: {where}.label: use letters, digits, '_' and '-', not '{shown(label)}'")
    try:
        measures.REGISTRY.load(name)(**options)  # it knows best whether its options go together
    except InputError as error:
        raise InputError(f"{source}: {where}: {error}") from error
    return label, {"name": name, **options}
