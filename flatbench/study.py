"""The study file: its schema, how it is read, and how its sections become methods with a fair budget."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from flatbench import measures, optim, study_files, tasks
from flatbench.errors import InputError, suggest
from flatbench.options import ADAPTER_SHORTHANDS, AdapterOptions, BaseOptimizerOptions, TrainOptions
from flatbench.registry import Options, Registry
from flatbench.seeding import derive_seed

Seed = Annotated[int, Field(ge=0)]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
Name = Annotated[str, Field(pattern=f"^{study_files.NAME}$")]

#: methods that are known by name though no optimizer has that name
METHOD_SHORTHANDS: dict[str, dict[str, Any]] = {
    "full_ft": {"adapter": "none", "optimizer": "plain"},
    "lora": {"optimizer": "plain"},
}
METHOD_DESCRIPTIONS = {
    "full_ft": "Every weight of the model trains with the base optimizer.",
    "lora": "The base optimizer on the adapter's A and B.",
}


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


class Method(Options):
    """One entry of ``methods:``, with shorthands written out: adapter x optimizer x base optimizer."""

    name: Name
    adapter: AdapterOptions
    optimizer: dict[str, Any]
    train: TrainOptions
    grid: Grid = {}


class StudyFile(Options):
    """A study file as a person writes it."""

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


class _MethodEntry(Options):
    """A mapping under ``methods:`` before its shorthands are written out."""

    name: Name
    adapter: str | dict[str, Any] | None = None
    optimizer: str | dict[str, Any] | None = None
    train: dict[str, Any] = {}
    grid: Grid = {}


class Study:
    """A validated study: everything resolved except which hyper-parameters win.

    Attributes:
        file: the validated sections.
        source: the file's name, for messages.
        measures: label -> {"name": …, options}.
    """

    def __init__(self, content: Mapping[str, Any], source: str) -> None:
        self.source = source
        self.file: StudyFile = _validated(StudyFile, content, source)
        self._check_seeds()
        self.measures = _measures(self.file.measures, source)
        self.conditions = [self._condition(choice) for choice in _product(self.file.grid)]

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

    def _condition(self, choice: Mapping[str, Any]) -> Condition:
        content: dict[str, Any] = self.file.model_dump()
        for key, value in choice.items():
            section, dot, option = key.partition(".")
            if section not in ("task", "model", "adapter", "train"):
                raise InputError(
                    f"{self.source}: grid.{key}: name a section first: task.…, model.…, adapter.… or train.…"
                )
            if not dot:
                content[section] = value
            else:
                content[section] = {**_as_mapping(content[section], self.source, section), option: value}
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
        self.label = ", ".join(f"{key}={_short(value)}" for key, value in choice.items())
        self.task, self.model = _task(content, source)
        train = _validated(TrainOptions, content["train"], source, "train")
        entries = enumerate(study.file.methods)
        self.methods = [_method(entry, i, content["adapter"], train, source) for i, entry in entries]
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"{source}: methods: two methods are called '{name}'; give each its own name"
                )
        self.trials = {
            method.name: _trials(method, i, study.file.tune, source) for i, method in enumerate(self.methods)
        }
        if study.file.tune:
            _check_budget(self.trials, source)

    def configured(self, method: Method, choice: Mapping[str, Any]) -> Method:
        """The method with the hyper-parameters of one trial put in."""
        return _with_choice(method, choice, "", "")


def _trials(method: Method, index: int, tune: Tune | None, source: str) -> list[dict[str, Any]]:
    where = f"methods[{index}] ({method.name})"
    grid = {**(tune.grid if tune else {}), **method.grid}
    if tune and "lr" not in grid and "train.lr" not in grid:
        raise InputError(
            f"{source}: {where}: tune.grid must hold 'lr': the learning rate matters more than the method "
            "(arXiv 2602.04998), so each method gets its own"
        )
    choices = _product(grid)
    for choice in choices:
        _with_choice(method, choice, source, f"{where}.grid")
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


def _with_choice(method: Method, choice: Mapping[str, Any], source: str, where: str) -> Method:
    """``method`` with each ``key: value`` put into the section that owns the key."""
    sections: dict[str, dict[str, Any]] = {
        "adapter": method.adapter.model_dump(),
        "optimizer": dict(method.optimizer),
        "train": method.train.model_dump(),
    }
    options = optim.REGISTRY.options(method.optimizer["name"]).model_fields
    for key, value in choice.items():
        section, dot, option = key.partition(".")
        if not dot:
            section, option = ("optimizer" if key in options else "train"), key
        known = {
            "adapter": [*AdapterOptions.model_fields],
            "optimizer": [*options],
            "train": [*TrainOptions.model_fields],
        }
        if section not in known:
            raise InputError(f"{source}: {where}.{key}: unknown section; {suggest(section, known)}")
        if option not in known[section]:
            all_known = known[section] if dot else {*options, *TrainOptions.model_fields}
            raise InputError(f"{source}: {where}.{key}: no such option here; {suggest(option, all_known)}")
        sections[section][option] = value
    return Method(
        name=method.name,
        adapter=_validated(AdapterOptions, sections["adapter"], source, where),
        optimizer=_optimizer(sections["optimizer"], source, where),
        train=_validated(TrainOptions, sections["train"], source, where),
        grid=method.grid,
    )


def _method(
    raw: str | Mapping[str, Any], index: int, study_adapter: Any, train: TrainOptions, source: str
) -> Method:
    where = f"methods[{index}]"
    entry = _validated(_MethodEntry, {"name": raw} if isinstance(raw, str) else raw, source, where)
    given = entry.model_dump(exclude_none=True)
    if entry.optimizer is None:
        shorthand = optim.ALIASES.get(entry.name, entry.name)
        if shorthand not in METHOD_SHORTHANDS and shorthand not in optim.REGISTRY:
            known = {*METHOD_SHORTHANDS, *optim.REGISTRY.names(), *optim.ALIASES}
            raise InputError(
                f"{source}: {where}: unknown method '{entry.name}'; {suggest(entry.name, known)}"
            )
        given = {**METHOD_SHORTHANDS.get(shorthand, {"optimizer": shorthand}), **given}
    adapter = _adapter(study_adapter, source, "adapter")
    if "adapter" in given:
        own = _adapter(given["adapter"], source, f"{where}.adapter")
        # full fine-tuning keeps the study's target modules: the merged space is measured on them as well
        kept = {"target_modules": adapter.get("target_modules")} if own.get("name") == "none" else adapter
        adapter = {**kept, **own}
    optimizer = given["optimizer"]
    optimizer = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    return Method(
        name=entry.name,
        adapter=_validated(AdapterOptions, adapter, source, f"{where}.adapter"),
        optimizer=_optimizer(optimizer, source, f"{where}.optimizer"),
        train=_validated(TrainOptions, {**train.model_dump(), **entry.train}, source, f"{where}.train"),
        grid=entry.grid,
    )


def _adapter(raw: Any, source: str, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        if raw not in ADAPTER_SHORTHANDS:
            raise InputError(
                f"{source}: {where}: unknown adapter '{raw}'; {suggest(raw, ADAPTER_SHORTHANDS)}"
            )
        return dict(ADAPTER_SHORTHANDS[raw])
    name = raw.get("name")
    shorthand = ADAPTER_SHORTHANDS.get(name, {}) if isinstance(name, str) else {}
    return {**raw, **shorthand}


def _optimizer(raw: Mapping[str, Any], source: str, where: str) -> dict[str, Any]:
    name, options = _plugin(optim.REGISTRY, {k: v for k, v in raw.items() if k != "base"}, source, where)
    base = raw.get("base", {})
    base = {"name": base} if isinstance(base, str) else base
    checked = _validated(BaseOptimizerOptions, base, source, f"{where}.base")
    return {"name": name, **options, "base": checked.model_dump(mode="json")}


def _plugin(
    registry: Registry, raw: Mapping[str, Any], source: str, where: str
) -> tuple[str, dict[str, Any]]:
    """Name and checked options of a plug-in from ``{"name": …, options}``."""
    options = dict(raw)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"{source}: {where}.name: missing; {suggest('', registry.names())}")
    name = optim.ALIASES.get(name, name) if registry is optim.REGISTRY else name
    if name not in registry:
        raise InputError(
            f"{source}: {where}: unknown {registry.kind} '{name}'; {suggest(name, registry.names())}"
        )
    checked = _validated(registry.options(name), options, source, where)
    return name, checked.model_dump(mode="json")


def _task(content: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = _as_mapping(content["task"], source, "task")
    if "model" in raw:
        raise InputError(f"{source}: task.model: unknown key; the model is a section of its own, 'model:'")
    name = raw.get("name")
    if isinstance(name, str) and name in tasks.REGISTRY:
        model = _validated(tasks.model_options(name), content["model"], source, "model").model_dump(
            mode="json"
        )
        raw = {**raw, "model": model}
    name, options = _plugin(tasks.REGISTRY, raw, source, "task")
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


def resolve_measure(entry: str | Mapping[str, Any], source: str, where: str) -> tuple[str, dict[str, Any]]:
    """Label and checked options of one measure. Raises InputError naming ``source`` and ``where``."""
    raw = dict(_as_mapping(entry, source, where))
    label = raw.pop("label", None)
    name, options = _plugin(measures.REGISTRY, raw, source, where)
    if label is None:
        label = f"{name}_{options['space']}" if "space" in options else name
    if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", label):
        raise InputError(f"{source}: {where}.label: use letters, digits, '_' and '-', not {label!r}")
    return label, {"name": name, **options}


def _as_mapping(raw: Any, source: str, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        return {"name": raw}
    if not isinstance(raw, Mapping):
        raise InputError(f"{source}: {where}: expected a name or a mapping, found {type(raw).__name__}")
    return dict(raw)


def _validated(model: type[Any], content: Any, source: str, where: str = "") -> Any:
    """``model`` made from ``content``; InputError with file, field and the nearest known name."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error, model, where)}") from None


def _first_problem(error: ValidationError, model: type[Any], where: str) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if not _is_union_branch(part)]
    field = ".".join([where, *path] if where else path) or "the file"
    if problem["type"] == "extra_forbidden":
        owner = model
        for part in path[:-1]:
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Options)), owner)
        return f"{field}: unknown key; {suggest(path[-1], owner.model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: missing"
    found = problem.get("input")
    return f"{field}: {problem['msg'].lower()}, found {_short(found)}"


def _is_union_branch(part: Any) -> bool:
    """Pydantic puts the name of a union's branch into an error's place; a person did not write it."""
    return isinstance(part, str) and (part in {"str", "bool", "int", "float"} or "[" in part)


def _product(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _short(value: Any) -> str:
    text = str(value.get("name", value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load(study: str, overrides: Sequence[str] = ()) -> Study:
    """Read a predefined study or a study file.

    Args:
        study: a predefined name, or the path of a YAML file.
        overrides: ``"train.epochs=1"`` and the like, values in YAML.

    Raises:
        InputError: the study cannot be found, read, or is not valid; the message names file and field.
    """
    content, source = study_files.read(study, overrides)
    return Study(content, source)
