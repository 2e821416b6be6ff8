"""Checkpoints of every kind open, damaged ones say why, and nothing that is asked of one changes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from measure_cases import same, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import flatbench
from flatbench import cache
from flatbench.adapters import lora_factors
from flatbench.checkpoint import load_checkpoint
from flatbench.errors import InputError, NotApplicableError
from flatbench.notebook import Measured

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
    assert found.loss == pytest.approx(expected, rel=1e-12)
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


# -- runs, cache, displays --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small study."""
    from conftest import SMALL
    from rich.console import Console

    from flatbench import progress, store, studyrun
    from flatbench.executors.local import Local
    from flatbench.study import Study

    content = {
        **SMALL,
        "methods": ["lora", "eflat_lora"],
        "measures": ["hessian", "slice", "cost"],
        "seeds": [0],
    }
    loaded = Study(content, "small.yaml")
    results = tmp_path_factory.mktemp("results")
    with progress.display(Console(quiet=True)) as display, Local(jobs=1) as executor:
        outcome = studyrun.run(loaded, store.StudyFolder(results, loaded.name), executor, display)
    assert not outcome.failed
    return results / loaded.name


def test_a_run_directory_gives_the_numbers_of_the_command_line(study: Path) -> None:
    table = flatbench.load_results(study)
    assert table["method"].tolist() == ["lora", "eflat_lora"]
    row = table.iloc[0]
    opened = flatbench.load_checkpoint(row["path"])
    assert list(opened.data) == ["train", "validation", "test"]
    found = opened.hessian(cached=False)
    assert found["eigenvalue_1"] == row["hessian_merged.eigenvalue_1"]
    sliced = opened.measure("slice", cached=False)
    assert sliced["mean_rise"] == row["slice_merged.mean_rise"]
    assert opened.cost()["step_ms"] == row["cost.step_ms"]
    lines = opened.landscape(points=21, draws=3, splits=["train"], distance=1.0, cached=False)
    assert lines.values(draw=2)["value"].tolist() == sliced["losses"][2]
    at_origin = opened.landscape(points=3, cached=False).meta["origin"]
    assert at_origin["test"]["accuracy"] == pytest.approx(row["test.accuracy"])
    assert at_origin["test"]["loss"] == pytest.approx(row["test.loss"], rel=1e-5)


def test_every_kind_of_sharpness(study: Path) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    sam = opened.sharpness(rho=0.1, cached=False)
    worst = opened.sharpness("worst", rho=0.1, m=None, cached=False)
    average = opened.sharpness("average", rho=[0.1, 0.2], cached=False)
    assert (sam.name, worst.name, average["kind"]) == ("sam_sharpness", "sharpness", "average")
    assert worst["sharpness"] == pytest.approx(sam["sharpness"], rel=0.2)  # two searches of one maximum
    assert average["sharpness_1"] < worst["sharpness"]
    with pytest.raises(InputError, match="unknown measure 'flat_sharpness'"):
        opened.sharpness("flat")


def test_two_runs_make_a_line(study: Path) -> None:
    first, second = (load_checkpoint(path) for path in flatbench.load_results(study)["path"])
    found = first.landscape(second, points=5, cached=False)
    assert "towards eflat_lora (0 = here, 1 = there)" in found.axes


def test_the_same_question_again_is_free(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path))
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    first = (opened.hessian(), opened.landscape(points=5))
    assert not first[0].cached
    assert {"landscapes", "measures"} <= {p.name for p in cache.folder().iterdir()}

    def never(*_: Any) -> Any:
        raise AssertionError("computed")

    object.__setattr__(opened, "loss", never)
    again = (opened.hessian(), opened.landscape(points=5))
    assert again[0].cached
    assert dict(again[0]) == dict(first[0])
    assert again[1].frame.equals(first[1].frame)
    with torch.no_grad():
        next(p for n, p in opened.model.named_parameters() if "lora_B" in n).add_(1e-3)
    with pytest.raises(AssertionError, match="computed"):
        opened.hessian()


def test_runs_that_cannot_be_opened(study: Path, tmp_path: Path) -> None:
    run = Path(flatbench.load_results(study)["path"][0])
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    with pytest.raises(InputError, match="brings its own data"):
        load_checkpoint(copy, batches())
    truncate(copy / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="truncated"):
        load_checkpoint(copy)
    (copy / "result.json").unlink()
    with pytest.raises(InputError, match="not trained yet"):
        load_checkpoint(copy)
    with pytest.raises(InputError, match="no results of a study here"):
        flatbench.load_results(tmp_path)
    with pytest.raises(InputError, match="make them with `flatbench run`"):
        flatbench.load_results("quickstart", tmp_path)


def test_what_notebooks_show(study: Path) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    shown = opened._repr_html_()
    assert "flatbench run" in shown
    assert "train 60, validation 50, test 100" in shown
    assert "lora" in repr(opened)
    found = opened.landscape(points=3, cached=False)
    assert "60" in found._repr_html_()
    assert "filter-normalised" in found._repr_html_()
    measured = Measured("hessian<", {"eigenvalue_1": 2.0, "long": "x" * 200}, True)
    assert "hessian&lt; (from the cache)" in measured._repr_html_()
    assert measured.to_frame()["name"].tolist() == ["eigenvalue_1", "long"]
    assert "eigenvalue_1=2" in repr(measured)


def test_a_progress_bar_on_request(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    opened.landscape(points=5, cached=False, progress=True)
    assert "landscape" in capsys.readouterr().err
    opened.landscape(points=5, cached=False)
    assert capsys.readouterr().err == ""


def test_stopped_and_asked_again_a_landscape_goes_on(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path))
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    whole = opened.landscape(points=9, stack=1, cached=False)
    inner: Callable[..., Any] = opened.loss
    left = 12

    def stopping(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return inner(*arguments)

    object.__setattr__(opened, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        opened.landscape(points=9, stack=1)
    object.__setattr__(opened, "loss", inner)
    found = opened.landscape(points=9, stack=1)
    assert 0 < found.meta["resumed_points"] < 9
    assert found.frame.equals(whole.frame)


def test_backbones_are_in_the_same_cache_folder(study: Path) -> None:
    assert list(cache.folder().glob("digits-*.safetensors"))
