"""A study file is checked whole before anything runs, and expands fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flatbench import study
from flatbench.config import study_files
from flatbench.config.yaml import parse
from flatbench.errors import InputError

#: ten to the ninth zeros in ten lines
DEEP = "a: &a0 [0, 0]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
MINIMAL: dict[str, Any] = {"name": "s", "task": "digits", "methods": ["lora"], "seeds": [0]}
TUNED: dict[str, Any] = {
    **MINIMAL,
    "methods": ["lora", {"name": "sam", "grid": {"lr": [1e-3, 1e-2], "rho": [0.05, 0.1]}}],
    "tune": {"grid": {"lr": [1e-3, 3e-3, 1e-2, 3e-2]}, "seeds": [7]},
}


def loaded(tmp_path: Path, content: Any, *overrides: str) -> study.Study:
    file = tmp_path / "s.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return study.load(str(file), overrides)


def problem(tmp_path: Path, content: Any, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        loaded(tmp_path, content, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_predefined_study_is_valid(tmp_path: Path) -> None:
    names = study_files.predefined()
    assert "quickstart" in names
    for name in names:
        variables = parse(names[name].read_text()).get("variables") or {}
        overrides = [f"variables.{key}={tmp_path}" for key in variables]
        assert study.load(name, overrides).name == name


def test_the_example_of_the_readme_is_a_study(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    conditions = loaded(tmp_path, example).conditions
    assert [c.label for c in conditions] == ["task.label_noise=0.0", "task.label_noise=0.2"]
    assert [m.name for m in conditions[0].methods] == ["lora", "sam", "eflat-on-dora"]
    assert conditions[0].methods[2].adapter.dora


def test_shorthands_are_written_out(tmp_path: Path) -> None:
    content = {**MINIMAL, "methods": ["full_ft", "lora", "sam", "fmlora", "efmlora"], "adapter": {"r": 4}}
    methods = {m.name: m for m in loaded(tmp_path, content).conditions[0].methods}
    assert methods["full_ft"].adapter.name == "none"
    assert methods["full_ft"].optimizer["name"] == "plain"
    assert methods["lora"].adapter.name == "lora"
    assert methods["lora"].adapter.r == 4
    assert methods["sam"].optimizer["rho"] == 0.05
    assert methods["fmlora"].optimizer["name"] == "flat_lora"
    assert methods["efmlora"].optimizer["name"] == "eflat_lora"


def test_a_method_is_adapter_by_optimizer_by_base(tmp_path: Path) -> None:
    entry = {
        "name": "mine",
        "adapter": "dora",
        "optimizer": {"name": "eflat_lora", "rho": 0.1, "base": {"name": "sgd", "momentum": 0.9}},
        "train": {"weight_decay": 0.1},
    }
    (method,) = loaded(tmp_path, {**MINIMAL, "adapter": {"r": 2}, "methods": [entry]}).conditions[0].methods
    assert method.adapter.dora
    assert method.adapter.r == 2
    assert method.optimizer["rho"] == 0.1
    assert method.optimizer["base"]["name"] == "sgd"
    assert method.optimizer["base"]["momentum"] == 0.9
    assert method.train.weight_decay == 0.1


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = "name: s\ntask: digits\nmethods: [lora]\nseeds: [0]\ntrain: {lr: 1e-3}\n"
    assert loaded(tmp_path, text).file.train.lr == 1e-3
    assert loaded(tmp_path, text, "train.lr=2e-4", "seeds=[3, 4]").file.train.lr == 2e-4


def test_grid_expands_to_every_combination(tmp_path: Path) -> None:
    (condition,) = loaded(tmp_path, TUNED).conditions
    assert condition.trials["lora"] == [{"lr": v} for v in (1e-3, 3e-3, 1e-2, 3e-2)]
    assert condition.trials["sam"] == [{"lr": lr, "rho": rho} for lr in (1e-3, 1e-2) for rho in (0.05, 0.1)]
    sam = next(m for m in condition.methods if m.name == "sam")
    configured = condition.configured(sam, {"lr": 1e-2, "rho": 0.1})
    assert configured.train.lr == 1e-2
    assert configured.optimizer["rho"] == 0.1


def test_conditions_expand_over_task_and_model(tmp_path: Path) -> None:
    content = {**MINIMAL, "grid": {"task.label_noise": [0.0, 0.4], "train.epochs": [1, 2]}}
    conditions = loaded(tmp_path, content).conditions
    assert [c.label for c in conditions] == [
        f"task.label_noise={noise}, train.epochs={epochs}" for noise in (0.0, 0.4) for epochs in (1, 2)
    ]
    assert [c.task["label_noise"] for c in conditions] == [0.0, 0.0, 0.4, 0.4]
    assert [c.methods[0].train.epochs for c in conditions] == [1, 2, 1, 2]


def test_conditions_that_differ_in_mappings_are_told_apart(tmp_path: Path) -> None:
    noises = [{"name": "digits", "label_noise": noise} for noise in (0.0, 0.4)]
    conditions = loaded(tmp_path, {**MINIMAL, "grid": {"task": noises}}).conditions
    assert len({c.label for c in conditions}) == 2
    assert [c.task["label_noise"] for c in conditions] == [0.0, 0.4]
    message = problem(tmp_path, {**MINIMAL, "grid": {"train.epochs": [1, 1]}})
    assert "the condition train.epochs=1 stands in it twice" in message


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [("lora", (False, False, True)), ("rslora", (True, False, True)), ("pissa", (False, False, "pissa"))],
)
def test_a_methods_adapter_replaces_the_studys_variant(tmp_path: Path, adapter: str, expected: Any) -> None:
    entry = {"name": "own", "adapter": adapter, "optimizer": "plain"}
    content = {**MINIMAL, "adapter": {"name": "dora", "r": 3}, "methods": [entry]}
    (method,) = loaded(tmp_path, content).conditions[0].methods
    assert (method.adapter.rslora, method.adapter.dora, method.adapter.init) == expected
    assert method.adapter.r == 3


def test_the_same_configuration_counts_once(tmp_path: Path) -> None:
    grid = {"lr": [1e-3, 1e-2, 0.001]}
    message = problem(tmp_path, {**MINIMAL, "tune": {"grid": grid, "seeds": [7]}})
    assert "{lr: 0.001} is tried twice" in message


def test_one_option_has_one_name(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"name": "sam", "grid": {"train.lr": [1e-3, 1e-2], "optimizer.rho": [0.1]}}
    content = {**MINIMAL, "methods": [entry], "tune": {"grid": {"lr": [1.0]}, "seeds": [7]}}
    assert loaded(tmp_path, content).conditions[0].trials["sam"] == [
        {"lr": 1e-3, "rho": 0.1},
        {"lr": 1e-2, "rho": 0.1},
    ]
    entry["grid"]["lr"] = [0.1]
    assert "'lr' stands in it twice" in problem(tmp_path, content)


def test_budgets_must_be_equal(tmp_path: Path) -> None:
    tune = {"grid": {"lr": [1e-3, 1e-2]}, "seeds": [7]}
    message = problem(tmp_path, {**TUNED, "tune": tune})
    assert "lora 2, sam 4" in message
    drawn = loaded(tmp_path, {**TUNED, "tune": {**tune, "trials": 2}}).conditions[0].trials
    assert [len(trials) for trials in drawn.values()] == [2, 2]


def test_too_small_a_grid_for_the_trials(tmp_path: Path) -> None:
    assert "has 4 configurations" in problem(tmp_path, {**TUNED, "tune": {**TUNED["tune"], "trials": 5}})


def test_the_learning_rate_is_always_tuned(tmp_path: Path) -> None:
    content = {**MINIMAL, "methods": ["sam"], "tune": {"grid": {"rho": [0.1]}, "seeds": [7]}}
    assert "must hold 'lr'" in problem(tmp_path, content)


def test_tuning_seeds_differ_from_final_seeds(tmp_path: Path) -> None:
    assert "tune.seeds: [0]" in problem(tmp_path, {**TUNED, "tune": {**TUNED["tune"], "seeds": [0]}})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
        ({"train": {"epohcs": 1}}, "train.epohcs: unknown key; did you mean 'epochs'?"),
        ({"train": {"epochs": "many"}}, "train.epochs"),
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"train": {"lr": -1}}, "train.lr"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds: the same seed twice"),
        ({"tune": {"grid": {"lr": [0.1, 0.2]}, "seeds": [9, 9]}}, "tune.seeds: the same seed twice"),
        ({"methods": ["lroa"]}, "methods[0]: unknown method 'lroa'; did you mean 'lora'?"),
        ({"methods": ["lora", "lora"]}, "two methods are called 'lora'"),
        ({"methods": [{"name": "sam", "optimizer": {"name": "sam", "rh": 1}}]}, "did you mean 'rho'?"),
        ({"methods": [{"name": "x", "optimizer": {"name": "sma"}}]}, "unknown optimizer 'sma'"),
        ({"methods": [{"name": "sam", "optimizer": {"name": "sam", "rho": -1}}]}, "optimizer.rho"),
        ({"methods": [{"name": "lora", "grid": {"rho": [1]}}]}, "methods[0] (lora).grid.rho: no such option"),
        ({"methods": [{"name": "lora", "grid": {"lr": []}}]}, "grid.lr"),
        ({"methods": [{"name": "lora", "grid": {"lr": ["x"]}}]}, "lr"),
        ({"methods": [{"name": "../../etc", "optimizer": "sam"}]}, "methods[0].name"),
        ({"methods": [3]}, "methods"),
        ({"adapter": "lroa"}, "adapter: unknown adapter 'lroa'; did you mean 'lora'?"),
        ({"adapter": {"rank": 4}}, "adapter.rank: unknown key"),
        ({"task": "digit"}, "task: unknown task 'digit'; did you mean 'digits'?"),
        ({"task": {"name": "digits", "noise": 1}}, "task.noise: unknown key"),
        ({"task": {"name": "digits", "label_noise": 2}}, "task.label_noise"),
        ({"task": {"label_noise": 0.1}}, "task.name: missing"),
        ({"task": {"name": "digits", "model": {}}}, "task.model"),
        ({"model": {"hidden": 3}}, "model.hidden: unknown key"),
        ({"measures": ["hesian"]}, "measures[0]: unknown measure 'hesian'; did you mean 'hessian'?"),
        ({"measures": ["hessian", "hessian"]}, "is measured twice"),
        ({"measures": [{"name": "hessian", "label": "../x"}]}, "measures[0].label"),
        ({"name": "../escape"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": None}, "name"),
        ({"grid": {"label_noise": [0]}}, "grid.label_noise: name a section first"),
        (
            {"grid": {"train.lr, train.epochs": [[0.1, 1], 0.2]}},
            "2 options need a list of as many values, not 0.2",
        ),
        ({"grid": {"train.lr, train.epochs": [[0.1]]}}, "2 options need a list of as many values, not [0.1]"),
        (
            {"grid": {"train.lr": [0.1], "train.lr, train.epochs": [[0.1, 1]]}},
            "'train.lr' stands in the grid twice",
        ),
        ({"tune": {"grid": {"lr": [1]}}}, "tune.seeds: missing"),
        ({"train": {"epochs": True}}, "train.epochs: no switch; give a value"),
        ({"train": {"lr": float("inf")}}, "train.lr"),
        ({"methods": [{"name": "sam", "optimizer": {"name": "sam", "rho": float("inf")}}]}, "optimizer.rho"),
        (
            {"methods": [{"name": "x", "optimizer": {"name": "plain", "base": {"nesterov": True}}}]},
            "nesterov",
        ),
        ({"measures": [{"name": "slice", "points": 4}]}, "measures[0]: Slice: points: 4 is even"),
        ({"adapter": {"target_modules": []}}, "target_modules"),
        ({"adapter": "none"}, "call the method full_ft"),
        ({"adapter": "none", "methods": ["flat_lora"]}, "works on an adapter"),
        ({"task": {1: 2, "name": "digits"}}, "task"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    message = problem(tmp_path, {**MINIMAL, **change})
    assert expected in message
    assert "s.yaml" in message


@pytest.mark.parametrize("missing", ["name", "task", "methods", "seeds"])
def test_a_missing_section_is_named(tmp_path: Path, missing: str) -> None:
    content = {key: value for key, value in MINIMAL.items() if key != missing}
    assert f"{missing}: missing" in problem(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: !!python/object/apply:os.system [echo]\n", "plain YAML"),
        ("name: [\n", "plain YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("name: a\nname: b\n", "given twice"),
        ("\x00", "plain YAML"),
        ("name: a\nmethods: &a [*a]\n", "an alias that holds itself"),
        (DEEP, "more than 100000 values"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_unknown_study() -> None:
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        study.load("quikstart")
    with pytest.raises(InputError, match="no such file"):
        study.load("nowhere/study.yaml")
    with pytest.raises(InputError, match="unknown study"):
        study.load("x" * 5000)


def test_options_of_a_grid_that_change_together(tmp_path: Path) -> None:
    grid = {"task.label_noise": [0.0, 0.1], "task.train_size, train.epochs": [[100, 8], [400, 2]]}
    conditions = loaded(tmp_path, {**MINIMAL, "grid": grid}).conditions
    assert [c.label for c in conditions[:2]] == [
        "task.label_noise=0.0, task.train_size=100",
        "task.label_noise=0.0, task.train_size=400",
    ]
    found = [(c.task["label_noise"], c.task["train_size"], c.methods[0].train.epochs) for c in conditions]
    assert found == [(0.0, 100, 8), (0.0, 400, 2), (0.1, 100, 8), (0.1, 400, 2)]


def test_a_label_has_as_many_of_the_options_as_tell_conditions_apart(tmp_path: Path) -> None:
    settings = [[100, 1, 8], [100, 2, 8], [400, 1, 8]]
    grid = {"task.train_size, train.epochs, train.batch_size": settings}
    labels = [c.label for c in loaded(tmp_path, {**MINIMAL, "grid": grid}).conditions]
    assert labels == [f"task.train_size={size}, train.epochs={epochs}" for size, epochs, _ in settings]
    alone = loaded(tmp_path, {**MINIMAL, "grid": {"task.train_size, train.epochs": [[100, 8]]}}).conditions
    assert [c.label for c in alone] == ["task.train_size=100"]
    doubled = {"task.train_size, train.epochs": [[100, 8], [100, 8]]}
    assert "stands in it twice" in problem(tmp_path, {**MINIMAL, "grid": doubled})


def test_variables(tmp_path: Path) -> None:
    content = {**MINIMAL, "variables": {"who": None}, "description": "for ${who}"}
    assert "variables.who has no value" in problem(tmp_path, content)
    assert loaded(tmp_path, content, "variables.who=me").file.description == "for me"
    assert "${whom}: no such variable; did you mean 'who'?" in problem(
        tmp_path, {**content, "description": "${whom}"}, "variables.who=me"
    )


@pytest.mark.parametrize("override", ["train.epochs", "=1", "train..epochs=1", "seeds.x=1", "train.lr=["])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in problem(tmp_path, MINIMAL, override)


def test_overrides_reach_into_shorthands(tmp_path: Path) -> None:
    assert loaded(tmp_path, MINIMAL, "task.label_noise=0.1").conditions[0].task["label_noise"] == 0.1
