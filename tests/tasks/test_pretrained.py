"""Pretrained models by name or folder: what is refused, what is new in them, what is adapted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from flatbench import store, study
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.runs.finish import finish
from flatbench.study.plan import Plan
from flatbench.tasks.text.glue import Glue
from tests.tasks.task_cases import bert_folder, gpt2_folder, write_rte


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.startswith("model.name_or_path: ")
    assert "\n" not in message
    return message


def build(model: PretrainedModel) -> Any:
    return pretrained.load(model, AutoModelForSequenceClassification, pretrained.config(model), 0)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "./nothing", "~/nothing-at-all", "a/b/c"):
        assert "no such folder" in refused(pretrained.config, PretrainedModel(name_or_path=name))


def test_a_hub_name_offline() -> None:
    model = PretrainedModel(name_or_path="nobody/no-such-model")
    assert "neither a local folder nor to be had from the hub" in refused(pretrained.config, model)


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers says of one over three lines is one line here, with what to do."""
    said = "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b."

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(f"{said}\n403 Client Error.")

    monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", refuse)
    message = refused(pretrained.config, PretrainedModel(name_or_path="a/b"))
    assert "model.name_or_path: a/b: it is gated: accept its terms on the hub and log in" in message
    assert "neither" not in message


@pytest.mark.parametrize(
    ("lost", "loader", "said"),
    [
        ("config.json", pretrained.config, "no config.json"),
        ("vocab.txt tokenizer.json", pretrained.tokenizer, "no tokenizer in this folder"),
        ("model.safetensors", build, "no *.safetensors in this folder"),
    ],
)
def test_folders_that_lack_something(tmp_path: Path, lost: str, loader: Any, said: str) -> None:
    folder = bert_folder(tmp_path / "bert")
    for name in lost.split():
        (folder / name).unlink(missing_ok=True)
    assert said in refused(loader, PretrainedModel(name_or_path=str(folder)))


def test_damaged_files(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    model = PretrainedModel(name_or_path=str(folder))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    assert "cannot load its weights" in refused(build, model)
    (folder / "config.json").write_text("{")
    assert "cannot load its configuration" in refused(pretrained.config, model)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    assert "unheard_of" in refused(pretrained.config, model)


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('evil-was-here').touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(pretrained.config, PretrainedModel(name_or_path=str(folder)))
    assert not Path("evil-was-here").exists()


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert", vocab_size=20)
    task = Glue(
        model=PretrainedModel(name_or_path=str(folder)),
        task="rte",
        data=str(write_rte(tmp_path / "data")),
    )
    assert "they do not belong together" in refused(task.fingerprint)


SMALL = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**SMALL, num_hidden_layers=1), ("classifier",)),
        (RobertaConfig(**SMALL, num_hidden_layers=1), ("classifier",)),
        (DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=1), ("pre_classifier", "classifier")),
        (DebertaV2Config(**SMALL, num_hidden_layers=1), ("pooler", "classifier")),
        (GPT2Config(vocab_size=20, n_embd=8, n_head=2, n_layer=1), ("score",)),
        (XLNetConfig(vocab_size=20, d_model=8, n_head=2, n_layer=1), ("sequence_summary", "logits_proj")),
        (T5Config(vocab_size=20, d_model=8, num_heads=2, num_layers=1, d_ff=8), ("classification_head",)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_head_is_new(config: Any, expected: tuple[str, ...]) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    assert pretrained.new_modules(model, {"missing_keys": [], "mismatched_keys": []}) == expected


def test_what_the_files_lack_below_the_head_is_new_too(tmp_path: Path) -> None:
    """An encoder saved without its pooler starts with a random one, which must train."""
    folder = bert_folder(tmp_path / "bert")
    from transformers import BertModel

    BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).save_pretrained(folder)
    model, info = build(PretrainedModel(name_or_path=str(folder)))
    assert pretrained.new_modules(model, info) == ("classifier", "bert.pooler.dense")


def test_a_missing_language_model_head_is_new_without_the_embedding(tmp_path: Path) -> None:
    """Its matrix is the embedding's, which is there."""
    model = PretrainedModel(name_or_path=str(bert_folder(tmp_path / "bert")))
    built, info = pretrained.load(model, AutoModelForMaskedLM, pretrained.config(model), 0)
    assert pretrained.missing_modules(built, info) == (
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.transform.dense",
    )


def test_a_classifier_of_another_task_gives_its_encoder(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    config = BertConfig.from_pretrained(folder, num_labels=3)
    donor = BertForSequenceClassification(config)
    donor.save_pretrained(folder)
    task = Glue(
        model=PretrainedModel(name_or_path=str(folder)), task="rte", data=str(write_rte(tmp_path / "data"))
    )
    model = task.build_model(0)
    assert model.classifier.weight.shape == (2, 16)
    assert task.modules_to_save == ("classifier",)
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, donor.bert.state_dict()[name])


def test_a_decoder_pads_with_its_last_token_and_padding_does_not_matter(tmp_path: Path) -> None:
    model = PretrainedModel(name_or_path=str(gpt2_folder(tmp_path / "gpt2")))
    task = Glue(
        model=model, task="rte", data=str(write_rte(tmp_path / "data")), max_length=64, validation_examples=20
    )
    assert task.target_modules == ("c_attn",)
    train = task.splits(0).train
    built = task.build_model(0).double().eval()
    order = sorted(range(len(train)), key=lambda i: len(train[i]["input_ids"]))
    with torch.no_grad():
        alone = built(**task.collate([train[order[0]]])).logits[0]
        padded = built(**task.collate([train[order[0]], train[order[-1]]])).logits[0]
    torch.testing.assert_close(alone, padded, rtol=1e-10, atol=1e-12)


def distilbert_study(tmp_path: Path, **adapter: Any) -> study.Study:
    folder = bert_folder(tmp_path / "bert")
    vocabulary = BertConfig.from_pretrained(folder).vocab_size
    config = DistilBertConfig(vocab_size=vocabulary, dim=8, n_heads=2, n_layers=1, hidden_dim=8)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    content = {
        "name": "other",
        "task": {"name": "glue", "task": "rte", "data": str(write_rte(tmp_path / "data"))},
        "model": {"name_or_path": str(folder)},
        "adapter": adapter,
        "methods": ["full_ft", "lora"],
        "seeds": [0],
    }
    return study.Study(content, "other.yaml")


def test_a_model_whose_modules_nobody_names(tmp_path: Path) -> None:
    """peft knows no default for this type; the study is refused before anything is trained."""
    results = store.StudyFolder(tmp_path / "results", "other")
    with pytest.raises(InputError, match=r"other.yaml: task: \w+: adapter.target_modules: .*'distilbert'"):
        Plan(distilbert_study(tmp_path), results)


def test_a_model_whose_modules_the_study_names(tmp_path: Path) -> None:
    results = store.StudyFolder(tmp_path / "results", "other")
    runs = Plan(distilbert_study(tmp_path, target_modules=["q_lin", "v_lin"]), results).final([])
    assert [run.config["adapter"]["target_modules"] for run in runs] == [["q_lin", "v_lin"]] * 2


def test_a_model_with_a_device_map_is_the_model(tmp_path: Path) -> None:
    folder = str(bert_folder(tmp_path / "bert"))
    plain, _ = build(PretrainedModel(name_or_path=folder))
    mapped, _ = build(PretrainedModel(name_or_path=folder, device_map={"": "cpu"}))
    assert mapped.hf_device_map == {"": "cpu"}
    state = mapped.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert "device_map" not in PretrainedModel(name_or_path=folder).model_dump()


def test_a_run_with_a_device_map_is_the_run(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    results = []
    for more in ({}, {"device_map": {"": "cpu"}}):
        content = {
            "name": "mapped",
            "task": {"name": "glue", "task": "rte", "data": str(write_rte(tmp_path / "data"))},
            "model": {"name_or_path": str(folder), **more},
            "methods": ["sam"],
            "train": {"epochs": 1, "batch_size": 16, "threads": 1},
            "seeds": [0],
        }
        files = store.StudyFolder(tmp_path / str(len(results)), "mapped")
        (run, *_) = Plan(study.Study(content, "mapped.yaml"), files).final([])
        directory = files.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done"
        results.append((directory.result() or {})["metrics"])
    assert results[0] == results[1]
