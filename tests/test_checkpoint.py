"""Checkpoints of every kind open, damaged ones say why, and nothing that is asked of one changes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from flatbench.errors import InputError, NotApplicableError
from flatbench.models.factors import lora_factors
from flatbench.notebook.load import load_checkpoint
from tests.measures.measure_cases import same, snapshot

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "a", "the"]


def bert(layers: int = 1, labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([[4], [6], [3]])).long()
    ids = torch.randint(5, 11, (3, 6)) * mask
    return [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}]


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batches()[0]).logits


def adapted(base: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], **options)
    model = peft.get_peft_model(base, config, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder, without a classification head that was trained."""
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, folder: Path, name: str = "default", **options: Any) -> tuple[Path, Tensor]:
    """An adapter saved as peft's tutorials do it, and the logits of what was saved."""
    model = adapted(BertForSequenceClassification.from_pretrained(base), name, **options)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder, logits(model)


@pytest.mark.parametrize("options", [{}, {"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
def test_a_peft_adapter(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder, expected = saved(base, tmp_path / "adapter", **options)
    random = torch.get_rng_state()
    opened = load_checkpoint(folder, batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(opened.model), expected)
    assert opened.space == "merged"
    assert len(opened.adapted) == 2
    assert len(lora_factors(opened.model)) == 2  # they train, as measures of the factors expect
    assert not opened.model.training
    assert opened.metadata["adapter"] == "LORA"
    assert opened.metadata["base"] == str(base)
    origin = opened.evaluate()["train"]
    assert origin["loss"] == pytest.approx(float(opened.model(**batches()[0]).loss))
    assert origin["accuracy"] == float((expected.argmax(-1) == batches()[0]["labels"]).double().mean())


def test_an_adapter_with_another_name(base: Path, tmp_path: Path) -> None:
    folder, expected = saved(base, tmp_path / "named", name="mine")
    assert not (folder / "adapter_config.json").exists()  # peft puts it one folder deeper
    opened = load_checkpoint(folder, batches())
    assert torch.equal(logits(opened.model), expected)
    assert opened.landscape(space="adapter", points=3, cached=False).loss > 0
    model = adapted(BertForSequenceClassification.from_pretrained(base), "mine")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"several adapters here \(mine, other\)"):
        load_checkpoint(tmp_path / "two")


def test_the_head_in_modules_to_save_decides_the_number_of_labels(tmp_path: Path) -> None:
    bert(labels=2).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = adapted(base, task_type="SEQ_CLS", modules_to_save=["classifier"])
    model.save_pretrained(str(tmp_path / "adapter"))
    bare = BertForSequenceClassification.from_pretrained(tmp_path / "base").bert
    bare.save_pretrained(tmp_path / "base")  # as a pretrained encoder comes: without a head
    opened = load_checkpoint(tmp_path / "adapter")
    assert torch.allclose(logits(opened.model), logits(model))
    plain = adapted(bert(labels=5))
    plain.save_pretrained(str(tmp_path / "headless"))
    with pytest.raises(
        InputError, match=r"weights for classifier\.bias, classifier\.weight; they would be random"
    ):
        load_checkpoint(tmp_path / "headless", base=tmp_path / "base")


def test_merged_and_plain_folders(base: Path, tmp_path: Path) -> None:
    model = adapted(BertForSequenceClassification.from_pretrained(base))
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    opened = load_checkpoint(tmp_path / "merged", batches(), target_modules=["query", "value"])
    torch.testing.assert_close(logits(opened.model), expected)
    assert opened.space == "merged"
    assert load_checkpoint(tmp_path / "merged").space == "all"
    with pytest.raises(InputError, match="leave base= away"):
        load_checkpoint(tmp_path / "merged", base=base)


@pytest.mark.parametrize("change", ["older", "newer"])
def test_an_adapter_of_another_peft_version(base: Path, tmp_path: Path, change: str) -> None:
    folder, expected = saved(base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if change == "older":
        kept = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "auto_mapping")
        config = {key: config[key] for key in kept}
    else:
        config |= {"peft_version": "99.0", "an_option_of_the_future": None}
    file.write_text(json.dumps(config))
    opened = load_checkpoint(folder)
    assert torch.equal(logits(opened.model), expected)


def test_a_base_given_as_a_model_is_copied(base: Path, tmp_path: Path) -> None:
    folder, expected = saved(base, tmp_path / "adapter")
    given = BertForSequenceClassification.from_pretrained(base)
    before = snapshot(given)
    opened = load_checkpoint(folder, base=given)
    assert torch.equal(logits(opened.model), expected)
    assert same(before, snapshot(given))
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(InputError, match=r"base model: .*give another with base="):
        load_checkpoint(folder)
    assert torch.equal(logits(load_checkpoint(folder, base=tmp_path / "moved").model), expected)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_damaged_files(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tmp_path / "adapter")
    truncate(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: truncated"):
        load_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"truncated|damaged"):
        load_checkpoint(folder)
    whole, _ = saved(base, tmp_path / "whole")
    (whole / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: damaged"):
        load_checkpoint(whole)
    (whole / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="names no peft_type"):
        load_checkpoint(whole)
    truncate(base / "model.safetensors")
    again = tmp_path / "again"
    adapted(bert()).save_pretrained(str(again))
    with pytest.raises(InputError, match=r"model\.safetensors: truncated"):
        load_checkpoint(again, base=base)


def test_pickles_are_not_opened(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.bin: pickled weights are not opened"):
        load_checkpoint(folder)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin: pickled weights are not opened"):
        load_checkpoint(base)


def test_a_base_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tmp_path / "adapter")
    wide = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    with pytest.raises(InputError, match="does not fit the base model given"):
        load_checkpoint(folder, base=wide)
    with pytest.raises(InputError, match="does not fit the base model given"):
        load_checkpoint(folder, base=nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"differing weights: .*layer\.1"):
        load_checkpoint(folder, base=bert(layers=2))
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="differing weights"):
        load_checkpoint(folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"but no adapter_model\.safetensors"):
        load_checkpoint(tmp_path)


def test_code_of_a_checkpoint_does_not_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}, "architectures": ["Evil"]}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError):
        load_checkpoint(base)


# -- data -------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(base: Path) -> list[dict[str, Any]]:
    return [{"text": "a very good film", "label": 0}, {"text": "bad", "label": 2}]


def test_text_goes_through_the_tokenizer(base: Path, texts: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"no tokenizer in .*give tokenizer="):
        load_checkpoint(base, texts)
    from transformers import BertTokenizer

    (base / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer.from_pretrained(str(base))
    tokenizer.save_pretrained(str(base))
    opened = load_checkpoint(base, {"train": texts, "test": texts[:1]})
    assert list(opened.data) == ["train", "test"]
    assert opened.data["train"][0]["labels"].tolist() == [0, 2]
    assert opened.data["train"][0]["input_ids"][0].tolist() == [2, 9, 8, 5, 7, 3]
    given = load_checkpoint(base, texts, tokenizer=tokenizer)
    assert torch.equal(given.data["train"][0]["input_ids"], opened.data["train"][0]["input_ids"])
    tokenised = [{"input_ids": tokenizer(t["text"])["input_ids"], "label": t["label"]} for t in texts]
    again = load_checkpoint(base, tokenised)
    assert torch.equal(again.data["train"][0]["input_ids"], opened.data["train"][0]["input_ids"])
    assert opened.landscape(points=3, space="all", cached=False).meta["examples"] == {"train": 2, "test": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no examples"),
        ("text", "a str; give batches"),
        ([3], "a mapping of tensors or a pair"),
        ([{"text": "good"}], "without a label"),
        ([{"number": 3, "label": 1}], "neither text nor input_ids"),
    ],
)
def test_data_of_no_use(base: Path, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_checkpoint(base, data, tokenizer=object())


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()


def test_a_live_model_with_a_loader_is_left_as_it_is() -> None:
    model = classifier().train()
    torch.manual_seed(2)
    loader = DataLoader(TensorDataset(torch.randn(13, 4).double(), torch.randint(0, 3, (13,))), batch_size=5)
    opened = load_checkpoint(model, loader, loss=nn.functional.cross_entropy, target_modules=["0", "4"])
    assert opened.model is model
    before = snapshot(model)
    found = opened.landscape(dims=2, points=5, cached=False)
    opened.hessian(k=2, cached=False)
    opened.sharpness(cached=False)
    assert same(before, snapshot(model))
    assert {"loss", "accuracy"} == set(found.frame["quantity"])
    model.eval()
    with torch.no_grad():
        inputs, targets = loader.dataset.tensors
        expected = float(nn.functional.cross_entropy(model(inputs), targets))
    assert found.loss == pytest.approx(expected, rel=1e-10)
    with pytest.raises(InputError, match="has no data"):
        load_checkpoint(model).landscape()
    with pytest.raises(InputError, match="no split 'test'"):
        opened.subject("test")
    with pytest.raises(NotApplicableError, match="no training was recorded"):
        opened.cost()


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("ask", ["hessian", "sharpness", "landscape", "evaluate"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_is(base: Path, tmp_path: Path, ask: str) -> None:
    folder, _ = saved(base, tmp_path / "adapter", modules_to_save=["classifier"])
    opened = load_checkpoint(folder, batches())
    opened.model.train()
    calls = 0
    inner = opened.model.get_base_model().bert.encoder.layer[0]

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise BrokenError

    for space in ("adapter", "merged"):
        calls = 0
        handle = inner.register_forward_hook(count)
        before = snapshot(opened.model)
        with pytest.raises(BrokenError):
            getattr(opened, ask)(**({} if ask == "evaluate" else {"space": space, "cached": False}))
        assert same(before, snapshot(opened.model))
        handle.remove()
