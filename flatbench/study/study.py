"""The study file: its schema, how it is read, and how its sections become methods with a fair budget."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from flatbench import measures, optim, tasks
from flatbench.config import accelerate as accelerate_options
from flatbench.config import study_files
from flatbench.config.registry import LATER, Options
from flatbench.config.sections import TrainOptions
from flatbench.config.validation import as_mapping, plugin, validated
from flatbench.errors import InputError, shown
from flatbench.security import remote_code
from flatbench.security.paths import Roots, check, named_paths, roots_of, usable
from flatbench.seeding import derive_seed
from flatbench.study import compatibility
from flatbench.study.methods import Grid, Method, Name, canonical, resolve_method, with_choice

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
        self.measures = _measures(_paired(entries) if self.file.cost == "paired" else entries, source)
        self.conditions = [self._condition(choice) for choice in self._settings()]
        for label, count in Counter(condition.label for condition in self.conditions).items():
            if count > 1:
                raise InputError(f"{source}: grid: the condition {shown(label)} stands in it twice")

    @property
    def name(self) -> str:
        """The study's name, which names its folders too."""
        return self.file.name

    def _check_seeds(self) -> None:
        seeds = self.file.seeds
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{self.source}: seeds: the same seed twice")
        shared = set(seeds) & set(self.file.tune.seeds if self.file.tune else ())
        if shared:
            raise InputError(
                f"{self.source}: tune.seeds: {sorted(shared)} are final seeds too; choose others, or "
                "the final runs would repeat what was selected for"
            )

    def _settings(self) -> Iterator[dict[str, Any]]:
        """The grid's choices. A key may name several options, whose values then change together."""
        for choice in _product(self.file.grid, self.source, "grid"):
            setting: dict[str, Any] = {}
            for key, value in choice.items():
                where = f"{self.source}: grid.{shown(key)}"
                options = [option.strip() for option in key.split(",")]
                values = value if len(options) > 1 else [value]
                if not isinstance(values, list) or len(values) != len(options):
                    raise InputError(
                        f"{where}: {len(options)} options need a list of as many values, not "
                        f"{shown(_in_one_line(value))}"
                    )
                for option, own in zip(options, values, strict=True):
                    if option in setting:
                        raise InputError(f"{where}: '{shown(option)}' stands in the grid twice")
                    setting[option] = own
            yield setting

    def _condition(self, choice: Mapping[str, Any]) -> Condition:
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
        return Condition(self, choice, content)


class Condition:
    """One setting of a study (task, model, training) in which its methods are compared.

    Attributes:
        label: "" if the study has one condition, else what sets it apart, as "task.label_noise=0.2".
        task: {"name": …, options}; model: the task's model options.
        methods: the methods, resolved for this condition.
        trials: method name -> the hyper-parameter choices that it tries.
    """

    def __init__(self, study: Study, choice: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        source = study.source
        self.label = ", ".join(f"{key}={_in_one_line(value)}" for key, value in choice.items())
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
            method.name: _trials(method, i, study.file.tune, source) for i, method in enumerate(self.methods)
        }
        if study.file.tune:
            _check_budget(self.trials, source)

    def options(self) -> Iterator[tuple[Options, str]]:
        """The checked options of every plug-in here, with the place in the file that each is from."""
        yield _checked(tasks.model_options(self.task["name"]), self.model), "model"
        # the model is a section of its own in the file, and an option of the task in the code
        options = tasks.REGISTRY.options(self.task["name"])
        yield _checked(options, {**self.task, "model": self.model}).model_copy(update={"model": None}), "task"
        for i, method in enumerate(self.methods):
            optimizer = optim.REGISTRY.options(method.optimizer["name"])
            yield _checked(optimizer, method.optimizer), f"methods[{i}].optimizer"
            yield method.adapter, f"methods[{i}].adapter"
            for choice in self.trials[method.name]:
                if "adapter.init_from" in choice:
                    yield self.configured(method, choice).adapter, f"methods[{i}].grid.adapter"

    def configured(self, method: Method, choice: Mapping[str, Any]) -> Method:
        """The method with the hyper-parameters of one trial put in."""
        return with_choice(method, choice, "", "")


def _checked(model: type[Options], content: Mapping[str, Any]) -> Options:
    return model.model_validate({key: value for key, value in content.items() if key in model.model_fields})


def _trials(method: Method, index: int, tune: Tune | None, source: str) -> list[dict[str, Any]]:
    where = f"methods[{index}] ({method.name})"
    shared = canonical(method, tune.grid if tune else {}, source, "tune.grid")
    grid = {**shared, **canonical(method, method.grid, source, f"{where}.grid")}
    if tune and "lr" not in grid:
        raise InputError(
            f"{source}: {where}: tune.grid must hold 'lr': the learning rate matters more than the method "
            "(arXiv 2602.04998), so each method gets its own"
        )
    choices = _product(grid, source, f"{where}.grid")
    seen: set[str] = set()
    for choice in choices:
        configured = with_choice(method, choice, source, f"{where}.grid").model_dump_json()
        if configured in seen:
            raise InputError(
                f"{source}: {where}.grid: {shown(_in_one_line(choice))} is tried twice; each configuration "
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


def _check_budget(trials: Mapping[str, Sequence[Any]], source: str) -> None:
    sizes = {name: len(choices) for name, choices in trials.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"{source}: tune.grid: methods would try different numbers of configurations ({listed}); "
            "make the grids equally large, or set tune.trials"
        )


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


def _paired(entries: Sequence[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
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


#: conditions of a study, or configurations of a method: a few short lists multiply to more than any memory
LARGEST_GRID = 100_000


def _product(grid: Mapping[str, Sequence[Any]], source: str, where: str) -> list[dict[str, Any]]:
    size = math.prod(map(len, grid.values()))
    if size > LARGEST_GRID:
        raise InputError(f"{source}: {where}: {size} combinations; {LARGEST_GRID} are the most")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _in_one_line(value: Any) -> str:
    """A value as a person writes it, whole, so that different values have different texts."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def load(study: str, overrides: Sequence[str] = (), *, roots: Iterable[str | Path] = ()) -> Study:
    """Read a predefined study or a study file.

    A file may come from somebody else: the paths in it must lie below its folder, the working directory, a
    value among ``overrides``, one of ``roots``, or a folder of ``$FLATBENCH_ROOTS``, and it may ask for the
    code of those models only that `flatbench.security.remote_code` was told of. ``Study(content, source)``
    asks neither.

    Args:
        study: a predefined name, or the path of a YAML file.
        overrides: ``"train.epochs=1"`` and the like, values in YAML.
        roots: further folders in which the study may read.

    Raises:
        InputError: the study cannot be found, read, or is not valid; the message names file and field.
    """
    path, _ = study_files.find(study)
    content, source = study_files.read(study, overrides)
    allowed = roots_of(path, [study_files.override_value(text) for text in overrides], roots)
    loaded = Study(_with_accelerate(content, source, allowed), source)
    _admit(loaded, allowed)
    return loaded


def _with_accelerate(content: dict[str, Any], source: str, allowed: Roots) -> dict[str, Any]:
    """The study with the content of the file that ``train.accelerate`` names in its place."""
    train = content.get("train")
    named = train.get("accelerate") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(named, str):
        return content
    try:
        check("train.accelerate", usable(named), allowed)
        return {**content, "train": {**train, "accelerate": accelerate_options.read(named)}}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except ValueError as error:
        raise InputError(f"{source}: train.accelerate: {error}") from None


def _admit(study: Study, allowed: Roots) -> None:
    """Raise InputError for a path that leaves the study's roots, or code that nobody asked for."""
    try:
        for condition in study.conditions:
            for options, where in condition.options():
                for field, text in named_paths(options, where):
                    check(field, text, allowed)
            if condition.model.get("trust_remote_code"):
                remote_code.check(condition.model["name_or_path"])
    except InputError as error:
        raise InputError(f"{study.source}: {error}") from None
