"""Every method can be named in a study, with its options; nonsense is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flatbench import optim, study
from flatbench.config.registry import options_model
from flatbench.errors import InputError
from flatbench.models import weights
from flatbench.runs import open as opening
from flatbench.runs import resume
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study import plan

NAMES = optim.REGISTRY.names()
STUDY: dict[str, Any] = {
    "name": "small",
    "task": {"name": "digits", "train_size": 60, "validation_size": 50, "test_size": 100},
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "pretrain_epochs": 1},
    "adapter": {"r": 2, "alpha": 4},
    "train": {"epochs": 2, "batch_size": 16, "lr": 1e-2, "log_every": 1, "threads": 1},
    "seeds": [0],
}


def loaded(method: Any, **changes: Any) -> study.Study:
    return study.Study({**STUDY, "methods": [method], **changes}, "small.yaml")


def finished(folder: Path, method: Any, **changes: Any) -> RunDirectory:
    made = StudyFolder(folder, "small")
    (run, *_) = plan.Plan(loaded(method, **changes), made).final([])
    directory = made.run(run.id)
    directory.prepare(run.spec())
    assert finish(directory.path) == "done"
    return directory


@pytest.mark.parametrize("alias", optim.ALIASES)
def test_aliases(alias: str) -> None:
    (method,) = loaded(alias).conditions[0].methods
    assert method.optimizer["name"] == optim.ALIASES[alias]


OPTIONS: dict[str, dict[str, Any]] = {
    "sam": {"norm": "layer", "every": 2, "rho_schedule": "cosine"},
    "eflat_lora": {"factor": "A", "grad_estimate": "tangent", "norm": "layer", "every": 2},
    "flat_lora": {"grad_estimate": "B", "rho_schedule": "inv_sqrt"},
    "flat_lora_rwp": {"every": 2, "rho_schedule": "constant"},
    "bi_lora": {"r": 1, "ascent_lr": 0.1},
    "msam": {"direction": "ascent"},
    "lora_mgpo": {"beta": 0.8, "every": 2},
    "swa": {"start": 0.5, "every": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_run(name: str, tmp_path: Path) -> None:
    method = {"name": "mine", "optimizer": {"name": name, **OPTIONS[name]}}
    directory = finished(tmp_path, method)
    config = directory.spec()["config"]["optimizer"]
    assert {key: config[key] for key in OPTIONS[name]} == OPTIONS[name]
    history = pd.read_parquet(directory.path / "history.parquet")
    if "rho" in optim.REGISTRY.options(name).model_fields:
        assert (history["perturbation_norm"].dropna() > 0).any()


def test_noise_and_second_adapters_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    for name in ("flat_lora_rwp", "bi_lora"):
        made = StudyFolder(tmp_path, name)
        runs = plan.Plan(loaded(name, seeds=[0, 1]), made).final([])
        seeds = []
        for run in runs:
            directory = made.run(run.id)
            directory.prepare(run.spec())
            opened = opening.open_run(directory, trained=False)
            config = opened.config
            trainer = resume.Trainer(
                opened.task, opened.model, opened.splits, opened.train, config["optimizer"], config["seed"]
            )
            drawn = trainer.optimizer
            seeds.append(
                drawn.seed if name == "flat_lora_rwp" else float(drawn._parameters[0].detach().sum())
            )
        assert seeds[0] != seeds[1]


def test_a_saved_adapter_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """The second adapter of Bi-LoRA is not in the file."""
    from safetensors.torch import load_file

    plain = load_file(weights.weights_file(finished(tmp_path / "lora", "lora").adapter))
    double = load_file(weights.weights_file(finished(tmp_path / "bi", "bi_lora").adapter))
    assert {key: value.shape for key, value in plain.items()} == {k: v.shape for k, v in double.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if optim.REGISTRY.load(name).needs_adapter])
def test_a_method_of_adapters_without_one_is_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match=rf"methods\[0\]: optimizer '{name}' works on an adapter"):
        loaded({"name": name, "adapter": "none"})


def test_a_wrong_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'every'"):
        loaded({"name": "looksam", "optimizer": {"name": "looksam", "evry": 3}})
    with pytest.raises(InputError, match="rho"):
        loaded({"name": "bi_lora", "optimizer": {"name": "bi_lora", "rho": -1}})


def test_options_are_those_of_the_constructor_that_is_called() -> None:
    class Same(optim.ASAM):
        pass

    class Own(optim.ASAM):
        def __init__(self, base_optimizer: Any, model: Any, *, strength: float = 2.0) -> None:
            super().__init__(base_optimizer, model, rho=strength)

    inherited = options_model(Same).model_json_schema()["properties"]
    assert inherited == optim.REGISTRY.options("asam").model_json_schema()["properties"]
    assert list(options_model(Own).model_fields) == ["strength"]
    assert "m_sharpness" not in options_model(optim.ASAM)().model_dump(), "added later: not hashed"
