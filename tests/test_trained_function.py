"""What is evaluated, measured and opened is the function that was trained, batch statistics included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

import flatbench
from flatbench.errors import InputError
from flatbench.models import weights
from flatbench.runs import finish, resume
from flatbench.runs import open as opening
from flatbench.store import RunDirectory


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the convolutions of a small ResNet with batch norm, and two classes of pictures."""
    root = tmp_path_factory.mktemp("norm")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    torch.manual_seed(0)
    transformers.ResNetModel(config).save_pretrained(root / "model")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "model")
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for kind in ("a", "b"):
            (root / "data" / split / kind).mkdir(parents=True)
            for i in range(count // 2):
                pixels = random.integers(0, 120, (16, 16, 3)) + 100 * (kind == "a")
                Image.fromarray(pixels.astype("uint8")).save(root / "data" / split / kind / f"{i}.png")
    content = {
        "name": "norm",
        "task": {"name": "image_classification", "data": str(root / "data")},
        "model": {"name_or_path": str(root / "model")},
        "adapter": {"name": "lora", "r": 2, "target_modules": ["convolution"]},
        "methods": ["lora"],
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01, "threads": 1},
        "seeds": [0],
        "measures": [],
    }
    (root / "norm.yaml").write_text(yaml.safe_dump(content))
    return root


@pytest.fixture(scope="module")
def finished(study: Path) -> RunDirectory:
    flatbench.run(study / "norm.yaml", output=study / "results", jobs=1)
    (path,) = (study / "results" / "norm" / "runs").iterdir()
    return RunDirectory(path)


@pytest.mark.slow
def test_batch_statistics_are_those_of_training(study: Path, finished: RunDirectory, tmp_path: Path) -> None:
    """The result is that of the model in memory, not of its adapter on the statistics of the start."""
    again = RunDirectory(tmp_path / finished.path.name)
    again.path.mkdir()
    (again.path / "run.json").write_bytes((finished.path / "run.json").read_bytes())
    session = resume.start_training(again)
    before = {name: b.clone() for name, b in weights.buffers(session.run.model).items()}
    session.trainer.run()
    after = weights.buffers(session.run.model)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 10
    result: Any = finished.result()
    expected = finish._evaluate(session.run)
    for split in ("train", "validation", "test"):
        assert result["metrics"][split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-5)
    opened = opening.open_run(finished, trained=True).model
    for name, buffer in weights.buffers(opened).items():
        assert torch.allclose(buffer.float(), after[name].float(), rtol=1e-4), name


@pytest.mark.slow
def test_an_adapter_without_its_statistics_is_refused(finished: RunDirectory, tmp_path: Path) -> None:
    model = opening.open_run(finished, trained=True).model
    weights.save(model, tmp_path / "saved")
    weights.load(model, tmp_path / "saved")
    (tmp_path / "saved" / weights.BUFFERS).unlink()
    with pytest.raises(InputError, match=r"no buffers\.safetensors beside the adapter"):
        weights.load(model, tmp_path / "saved")
    (tmp_path / "saved" / weights.BUFFERS).write_bytes(b"no")
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        weights.load(model, tmp_path / "saved")


@pytest.mark.slow
def test_what_is_not_saved_is_found_out(finished: RunDirectory) -> None:
    """The guard of the kind: whatever moved in training and is not in the files."""
    trained = opening.open_run(finished, trained=True).model
    loaded = opening.open_run(finished, trained=True).model
    weights.check_same(trained, loaded)
    name, buffer = next((n, b) for n, b in weights.buffers(trained).items() if b.is_floating_point())
    buffer.view(-1)[0] += 1e-3
    with pytest.raises(InputError, match=f"{name} is not saved"):
        weights.check_same(trained, loaded)


@pytest.mark.slow
def test_a_checkpoint_opened_elsewhere_has_them_too(study: Path, finished: RunDirectory) -> None:
    examples = json.loads((finished.path / "run.json").read_text())
    assert examples["config"]["adapter"]["name"] == "lora"
    opened = flatbench.load_checkpoint(finished.path)
    result: Any = finished.result()
    trained = opening.open_run(finished, trained=True)
    own = {n.rpartition("base_model.")[2]: b for n, b in weights.buffers(trained.model).items()}
    found = {n.rpartition("base_model.")[2]: b for n, b in weights.buffers(opened.model).items()}
    assert all(torch.equal(own[n], found[n]) for n in own)
    assert result["metrics"]["test"]["loss"] is not None


def test_half_precision_in_what_trains_is_noted() -> None:
    """Updates of it are rounded away, while another method's are not."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    assert finish._coarse_weights(model) == []
    model[1].to(torch.bfloat16)
    (note,) = finish._coarse_weights(model)
    assert note.startswith("10 of 30 trained weights are in bfloat16 (model.dtype; 1.weight)")
    model[1].requires_grad_(False)
    assert finish._coarse_weights(model) == []


@pytest.mark.slow
def test_changed_data_in_one_process_are_other_runs(study: Path, tmp_path: Path) -> None:
    """As in a notebook: run, change a file, run again."""
    shutil.copytree(study / "data", study / "changing")
    content = yaml.safe_load((study / "norm.yaml").read_text())
    content["task"]["data"] = str(study / "changing")
    content["train"]["epochs"] = 1
    (study / "other.yaml").write_text(yaml.safe_dump(content))
    for count in (1, 2):
        found = flatbench.run(study / "other.yaml", output=tmp_path / "results", jobs=1)
        assert set(found.table["state"]) == {"done"}
        assert len(list((tmp_path / "results" / "norm" / "runs").iterdir())) == count
        changed = study / "changing" / "train" / "a" / "0.png"
        Image.fromarray(np.zeros((16, 16, 3), dtype="uint8")).save(changed)


@pytest.mark.slow
def test_what_an_optimizer_freezes_is_not_counted_as_trained(study: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((study / "norm.yaml").read_text())
    content |= {"methods": ["lora", "lora_fa"], "task": {"name": "digits", "train_size": 64}}
    content["adapter"] = {"name": "lora", "r": 2}
    content["model"] = {"hidden_size": 16, "layers": 1, "heads": 2, "patch_size": 4, "pretrain_epochs": 1}
    content["train"]["epochs"] = 1
    (study / "other.yaml").write_text(yaml.safe_dump(content))
    flatbench.run(study / "other.yaml", output=tmp_path / "results", jobs=1)
    counts = {}
    for path in (tmp_path / "results" / "norm" / "runs").iterdir():
        run = RunDirectory(path)
        result: Any = run.result()
        counts[run.spec()["method"]] = result["training"]["trainable_parameters"]
    model = opening.open_run(run, trained=True).model
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_A" in n)
    assert counts["lora_fa"] == counts["lora"] - frozen < counts["lora"]
