"""Properties of studies, identities, results folders and interrupted runs, on cases that are drawn."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatbench import store, study
from flatbench.errors import InputError
from flatbench.models import weights
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study import plan
from flatbench.study.run import Run
from flatbench.training.trainer import Trainer
from tests.conftest import SMALL

pytestmark = pytest.mark.slow


QUIET = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

# -- expansion --------------------------------------------------------------------------------------------

GRIDS: dict[str, st.SearchStrategy[Any]] = {
    "task.label_noise": st.sampled_from([0.0, 0.1, 0.2]),
    "task.train_size": st.integers(60, 64),
    "train.epochs": st.integers(1, 4),
    "train.batch_size": st.sampled_from([8, 16, 32]),
    "adapter.r": st.integers(1, 4),
}
OWN: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([1e-4, 1e-3, 1e-2, 1e-1]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.1]),
    "rho": st.sampled_from([0.01, 0.05, 0.1, 0.5]),
}


@st.composite
def lists(draw: st.DrawFn, options: dict[str, st.SearchStrategy[Any]], most: int) -> dict[str, list[Any]]:
    names = draw(st.lists(st.sampled_from(sorted(options)), unique=True, max_size=most))
    return {n: draw(st.lists(options[n], unique=True, min_size=1, max_size=3)) for n in names}


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    plain = {key: value for key, value in OWN.items() if key != "rho"}
    methods = [
        {"name": "lora", "grid": draw(lists(plain, 2))},
        {"name": "sam", "grid": draw(lists(OWN, 3))},
        {"name": "eflat_lora", "grid": draw(lists(OWN, 2))},
    ]
    return {
        **copy.deepcopy(SMALL),
        "methods": draw(st.lists(st.sampled_from(methods), unique_by=lambda m: m["name"], min_size=1)),
        "grid": draw(lists(GRIDS, 2)),
        "seeds": draw(st.lists(st.integers(0, 2**40), unique=True, min_size=1, max_size=3)),
    }


def runs_of(content: dict[str, Any]) -> list[Run]:
    loaded = study.Study(content, "s")
    return plan.Plan(loaded, StudyFolder(Path("nowhere"), "small")).final([])


def product(grid: dict[str, list[Any]]) -> int:
    return math.prod(map(len, grid.values()))


@settings(QUIET, max_examples=60)
@given(content=studies())
def test_a_study_is_the_product_of_its_lists(content: dict[str, Any]) -> None:
    runs = runs_of(content)
    own = sum(product(method["grid"]) for method in content["methods"])
    assert len(runs) == product(content["grid"]) * own * len(content["seeds"])
    assert len({run.id for run in runs}) == len(runs)
    for run in runs:
        assert run.id == store.run_id(json.loads(json.dumps(run.config)), run.data)


def shuffled(node: Any, chance: Any) -> Any:
    """The same content with the keys of its mappings in another order."""
    if isinstance(node, dict):
        keys = list(node)
        chance.shuffle(keys)
        return {key: shuffled(node[key], chance) for key in keys}
    return [shuffled(value, chance) for value in node] if isinstance(node, list) else node


@settings(QUIET, max_examples=40)
@given(content=studies(), chance=st.randoms(use_true_random=False))
def test_the_order_of_keys_means_nothing(content: dict[str, Any], chance: Any) -> None:
    assert {run.id for run in runs_of(shuffled(content, chance))} == {run.id for run in runs_of(content)}


# -- identity ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(QUIET, max_examples=200)
@given(one=JSON, other=JSON, chance=st.randoms(use_true_random=False))
def test_equal_content_has_one_id_and_other_content_another(one: Any, other: Any, chance: Any) -> None:
    assert store.run_id(one, "d") == store.run_id(shuffled(one, chance), "d")
    assert store.run_id(one, "d") == store.run_id(json.loads(json.dumps(one)), "d")
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (store.run_id(one, "d") == store.run_id(other, "d")) is same
    assert store.run_id(one, "d") != store.run_id(one, "e")


@settings(QUIET, max_examples=60)
@given(content=studies(), data=st.data())
def test_any_changed_value_is_another_run(content: dict[str, Any], data: st.DataObject) -> None:
    (run, *_) = runs_of(content)
    section = data.draw(st.sampled_from(["task", "model", "adapter", "optimizer", "train"]))
    config = copy.deepcopy(dict(run.config))
    key = data.draw(st.sampled_from(sorted(config[section])))
    config[section][key] = [config[section][key], "changed"]
    assert store.run_id(config, run.data) != run.id


# -- results folders --------------------------------------------------------------------------------------

NUMBERS = st.none() | st.floats(-1e6, 1e6)
NAMES = st.sampled_from(["loss", "accuracy", "a.b", "_"])
FILES: dict[str, st.SearchStrategy[Any]] = {
    "result": st.fixed_dictionaries(
        {
            "metrics": st.dictionaries(
                st.sampled_from(["train", "validation", "test"]),
                # an accuracy has bounds, see tests/test_damage.py
                st.dictionaries(NAMES.filter(lambda name: name != "accuracy"), NUMBERS, max_size=3),
            ),
            "training": st.dictionaries(NAMES, NUMBERS, max_size=2),
        }
    ),
    "failure": st.fixed_dictionaries(
        {"state": st.sampled_from(["failed", "diverged"]), "error": st.text(), "traceback": st.text()}
    ),
    "measures/one": st.fixed_dictionaries({"config": JSON, "values": st.dictionaries(NAMES, NUMBERS)}),
    "measures/two": st.fixed_dictionaries({"config": JSON, "skipped": st.text(max_size=20)}),
    "done": st.just({"measures": []}),
    "environment": st.dictionaries(st.text(max_size=5), JSON, max_size=3),
}


def made(folder: StudyFolder, chosen: list[dict[str, Any]]) -> list[RunDirectory]:
    directories, places = [], []
    for seed, contents in enumerate(chosen):
        config = {"task": {}, "adapter": {"name": "lora"}, "optimizer": {"name": "sam"}, "seed": seed}
        config["stage"] = "final"
        directory = folder.run(store.run_id(config, "d"))
        own = {"study": "s", "condition": "", "method": "m", "metric": "accuracy", "hyper": {}}
        directory.prepare({**own, "config": config, "data": "d", "measures": {}})
        for name, content in contents.items():
            directory.write(name, content)
        directories.append(directory)
        places.append({"id": directory.id, "stage": "final", "condition": "", "method": "m", "hyper": {}})
    folder.write({"runs": places})
    return directories


STATES = st.lists(st.fixed_dictionaries({}, optional=FILES), min_size=1, max_size=4)


@settings(QUIET, max_examples=60)
@given(chosen=STATES)
def test_what_is_written_is_read(chosen: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = StudyFolder(Path(temporary), "s")
        directories = made(folder, chosen)
        for directory, contents in zip(directories, chosen, strict=True):
            assert directory.result() == contents.get("result")
            assert directory.environment() == contents.get("environment")
            stored = {name.removeprefix("measures/"): c for name, c in contents.items() if "/" in name}
            assert directory.measures() == stored
        table = store.table(folder)
        assert list(table["run"]) == [directory.id for directory in directories]
        assert list(table["state"]) == [directory.state() for directory in directories]
        again = store.table(StudyFolder(Path(temporary), "s"))
        assert table.equals(again)


@settings(QUIET, max_examples=120)
@given(chosen=STATES, data=st.data())
def test_damage_is_said_and_never_a_traceback(chosen: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = StudyFolder(Path(temporary), "s")
        made(folder, chosen)
        files = sorted(path for path in folder.path.rglob("*.json"))
        path = data.draw(st.sampled_from(files))
        raw = path.read_bytes()
        damage = data.draw(
            st.sampled_from([b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b"[[[["])
            | st.integers(0, len(raw)).map(lambda n: raw[:n])
            | st.binary(max_size=20)
        )
        path.write_bytes(damage)
        try:
            store.table(folder)
            store.history(folder)
            store.slices(folder)
            store.spectra(folder)
        except InputError as error:
            assert str(folder.path) in str(error)


# -- resuming ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the runner catches it."""


CONTENT = {**SMALL, "train": {**SMALL["train"], "epochs": 4}, "measures": []}


def trained(folder: Path, method: str, stops: list[int]) -> tuple[str, str]:
    """Digest of the weights and history of a run that is killed after each of these epochs."""
    results = StudyFolder(folder, "small")
    (run, *_) = plan.Plan(study.Study({**CONTENT, "methods": [method]}, "s"), results).final([])
    directory = results.run(run.id)
    directory.prepare(run.spec())
    original = Trainer.run
    for stop in stops:

        def killed(self: Trainer, after_epoch: Any, *more: Any, stop: int = stop, **named: Any) -> None:
            def after(trainer: Trainer) -> None:
                after_epoch(trainer)
                if trainer.epoch >= stop:
                    raise Killed

            original(self, after, *more, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "run", killed)
            with pytest.raises(Killed):
                finish(directory.path)
        assert directory.state() == "interrupted"
    assert finish(directory.path) == "done"
    history = store.history_of(directory).drop(columns="step_seconds")
    return weights.saved_digest(directory.adapter), history.to_csv()


@settings(QUIET, max_examples=6)
@given(
    method=st.sampled_from(["lora", "sam", "flat_lora", "eflat_lora"]),
    stops=st.lists(st.integers(1, 3), unique=True, min_size=1, max_size=2).map(sorted),
)
def test_a_run_killed_after_any_epochs_ends_the_same(method: str, stops: list[int]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        assert trained(Path(one), method, stops) == trained(Path(other), method, [])
