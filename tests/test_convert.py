"""Pickled weights become safetensors on the user's command, and nothing in them is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM
from typer.testing import CliRunner

from flatbench import cli
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.convert import convert
from flatbench.models.pretrained import PretrainedModel
from tests.tasks.task_cases import bert_folder


def pickled(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """A tiny BERT whose weights are pickles, as models on the hub were once saved; its weights."""
    bert_folder(folder, BertForMaskedLM)
    weights = load_file(folder / "model.safetensors")
    # tied to the embedding, and the same memory, as in the state of a model
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return weights
    names = list(weights)
    parts = {f"pytorch_model-{i + 1}.bin": names[i::shards] for i in range(shards)}
    for file, own in parts.items():
        torch.save({name: weights[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


def logits(folder: Path) -> torch.Tensor:
    model = PretrainedModel(name_or_path=str(folder))
    loaded, info = pretrained.load(model, BertForMaskedLM, pretrained.config(model), 0)
    assert not info["missing_keys"]
    found: torch.Tensor = loaded.eval()(input_ids=torch.arange(5, 15)[None]).logits
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_model(tmp_path: Path, shards: int) -> None:
    weights = pickled(tmp_path / "old", shards)
    message = refused(lambda: logits(tmp_path / "old"))
    assert "no *.safetensors in this folder" in message
    assert f"flatbench convert {tmp_path / 'old'} --output DIR" in message
    done = CliRunner().invoke(
        cli.app, ["convert", str(tmp_path / "old"), "--output", str(tmp_path / "new")], catch_exceptions=False
    )
    assert f"{shards} files of weights" in done.stdout
    found = {k: v for file in (tmp_path / "new").glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not list((tmp_path / "new").glob("*.bin*"))
    bert_folder(tmp_path / "never pickled", BertForMaskedLM)
    torch.testing.assert_close(logits(tmp_path / "new"), logits(tmp_path / "never pickled"))


class Calls:
    """What would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_converted(tmp_path: Path) -> None:
    pickled(tmp_path / "old")
    torch.save({"weight": Calls(tmp_path / "ran")}, tmp_path / "old" / "pytorch_model.bin")
    assert "holds more than weights" in refused(lambda: convert(str(tmp_path / "old"), tmp_path / "new"))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
    torch.save([torch.ones(1)], tmp_path / "old" / "pytorch_model.bin")
    assert "holds no weights by name" in refused(lambda: convert(str(tmp_path / "old"), tmp_path / "new"))
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    assert "no pytorch_model.bin to convert" in refused(
        lambda: convert(str(tmp_path / "old"), tmp_path / "new")
    )
    index = {"weight_map": {"weight": "../secret.bin"}}
    (tmp_path / "secret.bin").write_bytes(b"")
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "names files that are not there" in refused(
        lambda: convert(str(tmp_path / "old"), tmp_path / "new")
    )
    safe = str(bert_folder(tmp_path / "safe"))
    assert "it has safetensors already" in refused(lambda: convert(safe, tmp_path / "new"))
    assert "is there already" in refused(lambda: convert(safe, tmp_path))
    assert "with no network, name a folder" in refused(lambda: convert("nobody/nothing", tmp_path / "new"))
