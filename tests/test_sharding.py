"""A model in shards over several processes is trained to what one process reaches with the whole model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from flatbench import store
from flatbench.config.accelerate import AccelerateOptions
from flatbench.distributed import processes, shards
from flatbench.errors import InputError
from flatbench.models import weights as model_weights
from flatbench.runs.finish import finish
from flatbench.store import notes as data_notes
from flatbench.store import training_state
from tests import process_cases as cases
from tests import sharded_tasks
from tests.test_process_groups import distance, interrupted

pytestmark = pytest.mark.slow


DIVIDERS = {"fsdp": cases.everything_by_fsdp, "deepspeed": cases.everything_by_deepspeed}


# of three processes parts are unequal and one is empty; two train more, see `cases.in_shards`
GROUPS = [(by, size) for size in (3, 2) for by in DIVIDERS]


def in_group(group: tuple[str, int], *case: Any) -> Any:
    marks = [pytest.mark.long] * (group[1] == 2)
    return pytest.param(group, *case, marks=marks, id="-".join(map(str, (*group, *case))))


of_every_group = pytest.mark.parametrize("group", list(map(in_group, GROUPS)), indirect=True)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path | Exception]:
    """What a group of real processes over gloo has trained, once in whatever order tests are run."""

    @functools.cache
    def trained(by: str, size: int) -> Path | Exception:
        folder = tmp_path_factory.mktemp(f"{by}{size}")
        try:
            processes.launch(DIVIDERS[by], folder, size)
        except Exception as error:  # which is not to be waited for once more by each test
            return error
        return folder

    return trained


@pytest.fixture
def group(request: pytest.FixtureRequest, launched: Callable[..., Path | Exception]) -> tuple[Path, int]:
    folder = launched(*request.param)
    if isinstance(folder, Exception):
        raise folder
    return folder, request.param[1]


@pytest.mark.parametrize(
    ("group", "adapter", "name", "again"),
    [in_group(group, *case) for group in GROUPS for case in cases.in_shards(*group)],
    indirect=["group"],
)
def test_shards_are_trained_as_the_whole_model(
    group: tuple[Path, int], adapter: str, name: str, again: bool
) -> None:
    folder, size = group
    expected = cases.alone(name, cases.base_of(name), adapter, int(again))
    numbers = expected["still"]
    found = [training_state.load(folder / f"{name}-{adapter}-{again}-{rank}") for rank in range(size)]
    assert distance(found[0]["parameters"], expected["parameters"]) <= 1e-6
    for other in found[1:]:
        assert distance(other["parameters"], found[0]["parameters"]) == 0, "all put the same together"
    for row, other in zip(found[0]["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-6, nan_ok=True)
    assert sum(f["own"] for f in found) == numbers, "every number lies in one process"
    assert max(f["own"] for f in found) < 1.5 * numbers / size
    assert found[0]["count"] == expected["count"]


@of_every_group
def test_one_that_goes_on_ends_as_one_that_was_not_interrupted(group: tuple[Path, int]) -> None:
    folder, size = group
    for rank in range(size):
        whole, cut = (training_state.load(folder / f"interrupted-{cut}-{rank}") for cut in (False, True))
        assert distance(whole["parameters"], cut["parameters"]) == 0
        for row, other in zip(whole["history"], cut["history"], strict=True):
            assert row == pytest.approx(other, rel=0, abs=0, nan_ok=True)


@of_every_group
@pytest.mark.parametrize("name", cases.PER_PROCESS)
def test_m_sharpness_is_what_it_is_with_whole_models(group: tuple[Path, int], name: str) -> None:
    folder, size = group
    kinds = [
        [
            training_state.load(folder / f"{name}-m_sharpness-{kind}-{rank}")["parameters"]
            for rank in range(size)
        ]
        for kind in ("whole", "shards")
    ]
    for rank, whole in enumerate(kinds[0]):
        assert distance(whole, kinds[1][rank]) <= 1e-9
    # and not the perturbation by all processes' gradient
    assert distance(kinds[1][0], training_state.load(folder / f"{name}-lora-False-0")["parameters"]) > 1e-6


@pytest.fixture(scope="module", params=["fsdp", "deepspeed"])
def tasks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    by = {"fsdp": sharded_tasks.by_fsdp, "deepspeed": sharded_tasks.by_deepspeed}
    processes.launch(by[request.param], folder, 2)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("adapter", "name"), sharded_tasks.TASKS)
def test_every_tasks_model_can_be_divided(tasks: Path, tmp_path: Path, adapter: str, name: str) -> None:
    if "fsdp" in tasks.name and (adapter, name) not in sharded_tasks.BY_FSDP:
        pytest.skip("a single number that trains is refused")
    alone = sharded_tasks.of_task(name, sharded_tasks.CASES[name](tmp_path), adapter)
    start = alone.weights()
    expected, found = cases.trained(alone), training_state.load(tasks / f"{name}-{adapter}-0.state")
    assert distance(expected["parameters"], start) > 1e-4
    # in float32, and the scale that CLIP trains has large gradients
    limit = 1e-5 if "logit_scale" in start else 1e-6
    assert distance(expected["parameters"], found["parameters"]) <= limit
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"fsdp_transformer_layer_cls_to_wrap": "Block"},
            r"layer_cls_to_wrap: the model has no Block; it has .*Linear",
        ),
        (
            {"fsdp_transformer_layer_cls_to_wrap": None},
            r"the model names no layers itself; .* another policy",
        ),
    ],
)
def test_layers_that_a_model_does_not_have(config: dict[str, Any], message: str) -> None:
    layers = cases.fsdp(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", **config)
    options = AccelerateOptions.model_validate(layers)
    with pytest.raises(InputError, match=message):
        shards.shard(cases.Net(), options, torch.device("cpu"), 1)


def test_a_single_number_that_trains_cannot_be_divided() -> None:
    model = cases.Net()
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="cannot divide the single number scale"):
        shards.shard(model, AccelerateOptions.model_validate(cases.fsdp()), torch.device("cpu"), 1)


def settings(directory: store.RunDirectory) -> dict[str, Any]:
    """The configuration beside the saved weights; peft writes lists out of sets."""
    found = {}
    for path in sorted(directory.adapter.glob("*.json")):
        content = json.loads(path.read_text())
        content.pop("problem_type", None)  # which transformers notes at a model's first loss
        found[path.name] = {k: sorted(v) if isinstance(v, list) else v for k, v in content.items()}
    return found


def test_a_stage_that_is_not_run_is_noted(tmp_path: Path) -> None:
    second = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
    found = [cases.prepared(tmp_path / str(i), "lora", 2, config) for i, config in enumerate((second, None))]
    for directory in found:
        assert finish(directory.path) == "done"
    weights = [load_file(model_weights.weights_file(d.adapter)) for d in found]
    assert distance(*weights) == 0
    said = [data_notes.of_result(d.result()) for d in found]
    assert said[0] == [n for n in said[0] if n.startswith("DeepSpeed's stage 2 was not run")] != []
    assert said[1] == []


FSDP, DEEPSPEED = cases.fsdp(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP"), cases.deepspeed()


@pytest.mark.parametrize(
    ("layers", "method"),
    [
        (FSDP, "eflat_lora"),
        (DEEPSPEED, "full_ft"),
        # the others: each divider and each method is above, and in what is trained by both divided
        # parameters are put together and gone on with
        pytest.param(FSDP, "full_ft", marks=pytest.mark.long),
        pytest.param(DEEPSPEED, "eflat_lora", marks=pytest.mark.long),
    ],
)
def test_a_whole_run_and_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: dict[str, Any], method: str
) -> None:
    alone = cases.prepared(tmp_path / "1", method, 1)
    two = cases.prepared(tmp_path / "2", method, 2, layers)
    assert alone.id != two.id
    assert finish(alone.path) == "done"
    assert finish(two.path) == "done"
    results = [d.result() or {} for d in (two, alone)]
    for split, values in results[1]["metrics"].items():
        assert results[0]["metrics"][split] == pytest.approx(values, rel=1e-4)
    weights = [load_file(model_weights.weights_file(d.adapter)) for d in (two, alone)]
    # in float32, and Adam divides by what is near zero
    assert distance(*weights) <= (1e-3 if method == "full_ft" else 1e-5)
    history = [store.history_of(d).drop(columns="step_seconds") for d in (two, alone)]
    pd.testing.assert_frame_equal(*history, rtol=1e-3)
    files = [sorted(p.relative_to(d.path) for p in d.path.rglob("*") if p.is_file()) for d in (two, alone)]
    assert files[0] == files[1]
    assert settings(two) == settings(alone), "nothing of the shards is in what was saved"

    cut = cases.prepared(tmp_path / "cut", method, 2, layers)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(cut.path)
    assert cut.state() == "interrupted"
    assert finish(cut.path) == "done"
    assert distance(load_file(model_weights.weights_file(cut.adapter)), weights[0]) == 0
    assert '"resumed"' in (cut.path / "events.jsonl").read_text()
