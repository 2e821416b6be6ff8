"""Base optimizers that a study names: built, resumed, written down, and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench.errors import InputError
from flatbench.optim import SAM, Plain, bases, joined
from flatbench.runs import open as opening
from flatbench.runs import resume
from flatbench.store import StudyFolder, training_state
from flatbench.study import plan
from tests.optim.models import adapted, problem, snapshot, trainable
from tests.optim.test_studies import STUDY, finished, loaded
from tests.optim.test_two_points import same


def point(optimizer: Any, model: Any) -> Any:
    optimizer.eval()
    return snapshot(model)


NAMED = [
    "torch.optim.Muon",
    "torch.optim.NAdam",
    "schedulefree.AdamWScheduleFree",
    "schedulefree.SGDScheduleFree",
    "pytorch_optimizer.Lion",
    "pytorch_optimizer.ScheduleFreeAdamW",
]

TORCH = [name for name in bases.REGISTRY.names() if name.startswith("torch.optim")]


def available(name: str) -> str:
    pytest.importorskip(name.partition(".")[0])
    return name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_a_study_trains_with_it(name: str, tmp_path: Path) -> None:
    method = {"name": "mine", "optimizer": {"name": "eflat_lora", "base": {"name": available(name)}}}
    directory = finished(tmp_path, method, train={**STUDY["train"], "schedule": "constant", "lr": 1e-3})
    assert directory.spec()["config"]["optimizer"]["base"] == {"name": name}


@pytest.mark.slow
@pytest.mark.parametrize("base", NAMED)
def test_a_run_with_it_is_resumed_exactly(base: str, tmp_path: Path) -> None:
    """Within an epoch, through a file; and saving has changed nothing."""
    method = {"name": "mine", "optimizer": {"name": "eflat_lora", "base": {"name": available(base)}}}
    options = {**STUDY["train"], "schedule": "constant", "lr": 1e-3}

    def trainer(tag: str) -> Any:
        made = StudyFolder(tmp_path / tag, "small")
        (run, *_) = plan.Plan(loaded(method, train=options), made).final([])
        directory = made.run(run.id)
        directory.prepare(run.spec())
        found = opening.open_run(directory, trained=False)
        config = found.config
        return resume.Trainer(
            found.task, found.model, found.splits, found.train, config["optimizer"], config["seed"]
        )

    def save(at: Any) -> None:
        if at.step == 2:
            training_state.save(tmp_path / "state", at.state_dict())

    saved, resumed, plain = trainer("saved"), trainer("resumed"), trainer("plain")
    saved.run(after_step=save)
    resumed.load_state_dict(training_state.load(tmp_path / "state"))
    resumed.run()
    plain.run()
    assert same(saved.weights(), resumed.weights())
    assert same(saved.weights(), plain.weights())


@pytest.mark.parametrize(
    "name", [n for n in bases.REGISTRY.names() if n.startswith("torch.optim")] + NAMED[2:]
)
def test_it_is_built_from_its_name(name: str) -> None:
    available(name)

    def built(seed: int) -> tuple[Any, Any]:
        model = adapted(dtype=torch.float32, seed=seed)
        parts = [[p for p in trainable(model) if (p.ndim >= 2) == matrix] for matrix in (True, False)]
        groups = [{"params": part, "weight_decay": 0.0} for part in parts]
        return SAM(joined.build(groups, 1e-3, name, {}), model), model

    optimizer, model = built(0)
    before = snapshot(model)
    for _ in range(2):
        optimizer.step(problem(model))
    after = point(optimizer, model)
    assert not all(torch.equal(before[key], after[key]) for key in before)
    again, twin = built(0)
    twin.load_state_dict(after)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, copied_model = copy.deepcopy((optimizer, model))
    for made, of in ((optimizer, model), (again, twin), (copied, copied_model)):
        made.step(problem(of))
    assert same(point(optimizer, model), point(again, twin))
    assert same(point(optimizer, model), point(copied, copied_model))


def test_muon_and_adamw_are_torchs_own() -> None:
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    groups = [{"params": trainable(model), "weight_decay": 0.0}]
    optimizer = Plain(joined.build(groups, 1e-2, "torch.optim.Muon", {"momentum": 0.5}), model)
    matrices = [p for p in trainable(twin) if p.ndim == 2]
    vectors = [p for p in trainable(twin) if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=1e-2, momentum=0.5, weight_decay=0.0)
    rest = torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.step(problem(model))
        problem(twin)()
        muon.step()
        rest.step()
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"name": "torch.optim.LBFGS"}, "unknown base optimizer"),
        ({"name": "os.system"}, "unknown base optimizer"),
        ("adamv", "did you mean"),
        ({"name": "torch.optim.NAdam", "lr": 0.1}, "section train"),
        ({"name": "torch.optim.NAdam", "momentum": 0.1}, "did you mean 'momentum_decay'"),
        ({"name": "torch.optim.NAdam", "betas": [2, 0.9]}, "refuses its options"),
        ({"name": "adamw", "momentum": 0.5}, "options of sgd"),
    ],
)
def test_a_study_that_names_nonsense(base: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        loaded({"name": "mine", "optimizer": {"name": "sam", "base": base}})


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(InputError, match="pip install schedulefree"):
        loaded({"name": "mine", "optimizer": {"name": "sam", "base": "schedulefree.AdamWScheduleFree"}})


def test_a_weight_decay_that_it_has_not() -> None:
    groups = [{"params": trainable(adapted()), "weight_decay": 0.1}]
    with pytest.raises(InputError, match=r"weight_decay to 0"):
        joined.build(groups, 1e-3, "torch.optim.Rprop", {})


def test_what_is_written_of_a_base_stays_as_it_was() -> None:
    """Runs are named by it."""
    (method,) = loaded({"name": "sam", "optimizer": {"name": "sam", "base": "adamw"}}).conditions[0].methods
    own = {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.0, "nesterov": False}
    assert method.optimizer["base"] == own
