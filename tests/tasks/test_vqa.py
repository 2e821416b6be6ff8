"""Questions about images: which tokens the loss counts, batches, learning, texts too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatbench import store
from flatbench.labels import IGNORED
from flatbench.runs import open as opening
from flatbench.runs.finish import finish
from flatbench.study import Study
from flatbench.study.plan import Plan
from flatbench.subject.objective import first_examples
from flatbench.tasks.vqa import data as vqa_data
from flatbench.tasks.vqa.vqa import VQA
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import real
from tests.tasks.vqa_cases import FOLDERS, make, qwen_folder, refused, write_scienceqa, write_vizwiz

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("vqa") / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("vqa") / "qwen")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scienceqa(tmp_path_factory.mktemp("scienceqa"))


@pytest.fixture(scope="module")
def vizwiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vizwiz(tmp_path_factory.mktemp("vizwiz"))


# -- what the loss counts ---------------------------------------------------------------------------------


def plain_inputs(task: VQA, index: int) -> tuple[dict[str, Tensor], list[int]]:
    """One question through the processor itself, with its picture; and the answer's tokens."""
    question, encoder = task.parts["train"][index], task._encoder
    processor = encoder.processor
    options: dict[str, Any] = {"images": [question.picture.open()]} if question.picture else {}
    inputs = dict(processor(text=[encoder.prompt(question)], return_tensors="pt", **options))
    return inputs, encoder.target(question.answer)


def plain_loss(model: nn.Module, task: VQA, index: int) -> tuple[float, int]:
    """Sum over the answer's tokens of -log p, token by token of one question, without labels."""
    inputs, target = plain_inputs(task, index)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            more = {"input_ids": target, "attention_mask": [1] * len(target)}.get(name, [0] * len(target))
            inputs[name] = torch.cat([inputs[name], torch.tensor([more])], 1)
    scores = model(**inputs).logits[0].double().log_softmax(-1)
    places = range(inputs["input_ids"].shape[1] - len(target) - 1, inputs["input_ids"].shape[1] - 1)
    return -sum(float(scores[p, t]) for p, t in zip(places, target, strict=True)), len(target)


def test_the_loss_is_that_of_the_answers_tokens(folder: Path, data: Path) -> None:
    """Pictures of three sizes and questions without one in a batch, padded on either side."""
    task = make(folder, data, padding_side="left")
    model = task.build_model(0).eval()
    train = task.splits(0).train
    chosen = range(7)
    kinds = {None if q.picture is None else q.picture.size() for q in task.parts["train"][:7]}
    assert kinds == {None, (60, 40), (40, 60), (84, 28)}
    with torch.no_grad():
        sums = [plain_loss(model, task, i) for i in chosen]
        expected = sum(s for s, _ in sums) / sum(n for _, n in sums)
        for side in ("left", "right"):
            task.padding_side = side  # type: ignore[assignment]
            batch = task.collate([train[i] for i in chosen])
            assert float(task.loss(model, batch)) == pytest.approx(expected, rel=2e-5)
            assert task.terms(batch) == sum(n for _, n in sums)
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][batch["attention_mask"] == 0] = 5
            assert not torch.equal(changed["input_ids"], batch["input_ids"])
            assert torch.equal(task.loss(model, batch), task.loss(model, changed))


def test_tokens_are_those_that_the_processor_gives(folder: Path, data: Path) -> None:
    """The image's places are put in without running the processor on every picture, to the same end."""
    task = make(folder, data)
    train = task.splits(0).train
    for index in (0, 1, 2, 5):
        inputs, target = plain_inputs(task, index)
        example = train[index]
        assert example["input_ids"] == [*inputs.pop("input_ids")[0].tolist(), *target]
        inputs.pop("attention_mask")
        for name, value in inputs.items():
            if isinstance(example.get(name), Tensor):
                assert torch.equal(example[name], value)
            else:
                assert example.get(name, [0] * 999)[: value.shape[1]] == value[0].tolist()


def test_labels_are_the_answer_and_its_end(folder: Path, data: Path) -> None:
    task = make(folder, data)
    tokenizer = task._encoder.tokenizer
    train = task.splits(0).train
    for example, question in zip(train, task.parts["train"], strict=True):
        labels = torch.tensor(example["labels"])
        kept = labels[labels != IGNORED].tolist()
        assert example["input_ids"][-len(kept) :] == kept
        assert tokenizer.decode(kept[:-1]).strip() == question.answer
        assert kept[-1] in task._encoder.stops
        assert (labels[: -len(kept)] == IGNORED).all()


def test_batches_can_be_cut_by_examples(folder: Path, data: Path) -> None:
    """As measures and micro-batches cut them."""
    task = make(folder, data)
    model = task.build_model(0).eval()
    train = task.splits(0).train
    batch = task.collate([train[i] for i in range(6)])
    assert {len(value) for value in batch.values()} == {6}
    with torch.no_grad():
        [cut] = first_examples([batch], 3)
        whole = task.collate([train[i] for i in range(3)])
        assert float(task.loss(model, cut)) == pytest.approx(float(task.loss(model, whole)), rel=1e-5)


def test_batch_size_changes_no_metric(folder: Path, data: Path) -> None:
    """Also where a whole batch has no picture, after one that has: losses, texts and probabilities alike."""
    task = make(folder, data)
    model = task.build_model(0)
    test = task.splits(0).test
    one, many = (
        task.evaluate(model, fixed_batches(task, test, size, CPU)) | task.test_metrics(model, test, size)
        for size in (1, 9)
    )
    assert many == pytest.approx(one, rel=1e-5)
    assert task.generate(model, test, 1) == task.generate(model, test, 9)
    alone, together = (task.probability(model, test, "A", size) for size in (1, 9))
    assert together == pytest.approx(alone, rel=1e-4)
    logits = [scores(task, model, i) for i in range(2)]
    assert together[:2] == pytest.approx(logits, rel=1e-4)


def scores(task: VQA, model: nn.Module, index: int) -> float:
    """exp of the plain log-likelihood of the answer "A" to a test question."""
    parts = {**task.parts, "train": task.parts["test"]}
    question = parts["train"][index]
    source = dict(zip(("dataset", "data", "revision"), task.source_options, strict=False))
    other = VQA(model=task.model, **source,
                instruction="", max_length=512)  # fmt: skip
    other.__dict__["parts"] = {**parts, "train": (*[question] * index, _answering(question, "A"))}
    with torch.no_grad():
        return float(np.exp(-plain_loss(model.eval(), other, index)[0]))


def _answering(question: vqa_data.Question, answer: str) -> vqa_data.Question:
    return vqa_data.Question(**{**question.__dict__, "answer": answer})


def test_adapters_go_into_the_language_model_alone(folder: Path, data: Path) -> None:
    task = make(folder, data)
    model = task.build_model(0)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)
             and any(n == t or n.endswith(f".{t}") for t in task.target_modules)]  # fmt: skip
    assert len(names) == 2
    assert not any("vision" in name or "visual" in name for name in names)


def test_fixed_image_sizes_give_every_picture_the_same_places(qwen: Path, data: Path) -> None:
    task = make(qwen, data, image_size=56, questions="with_image")
    batch = task.collate(list(task.splits(0).train))
    assert set(batch["image_rows"][:, 1].tolist()) == {16}  # 4 x 4 patches of 14 pixels
    assert (batch["mm_token_type_ids"].sum(1) == 4).all()
    free = make(qwen, data, questions="with_image")
    rows = free.collate(list(free.splits(0).train))["image_rows"][:, 1]
    assert len(set(rows.tolist())) > 1


# -- learning ---------------------------------------------------------------------------------------------


def study(folder: Path, data: Path, methods: list[Any], task: dict[str, Any], **train: Any) -> Study:
    content = {
        "name": "colours",
        "task": {"name": "vqa", "dataset": "scienceqa", "data": str(data), "instruction": "",
                 "max_length": 256, "max_new_tokens": 3, **task},
        "model": {"name_or_path": str(folder)},
        "adapter": {"r": 2, "alpha": 4},
        "methods": methods,
        "seeds": [0],
        "train": {"batch_size": 12, "threads": 1, "log_every": 1, **train},
        "measures": [
            {"name": "slice", "points": 3, "directions": 1, "examples": 6},
            {"name": "hessian", "examples": 4, "max_iterations": 3},
            "cost",
        ],
    }  # fmt: skip
    return Study(content, "colours.yaml")


def finished(loaded: Study, folder: Path) -> list[store.RunDirectory]:
    results = store.StudyFolder(folder, "colours")
    directories = []
    for run in Plan(loaded, results).final([]):
        directory = results.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        directories.append(directory)
    return directories


@pytest.mark.slow
def test_adapters_train_save_reload_and_are_measured(qwen: Path, data: Path, tmp_path: Path) -> None:
    sizes = {"train_examples": 12, "validation_examples": 3, "test_examples": 6}
    loaded = study(qwen, data, ["lora", "flat_lora", "eflat_lora"], sizes, epochs=4, lr=3e-2)
    for directory in finished(loaded, tmp_path / "results"):
        losses = store.history_of(directory)["loss"].dropna()
        assert losses.iloc[-1] < losses.iloc[0]
        measured = directory.measures()
        assert measured["slice_merged"]["values"]["loss"] > 0
        assert measured["cost"]["values"]
        assert measured["hessian_merged"]["values"]["eigenvalue_1"]
        result = directory.result()
        assert result is not None
        assert 0 <= result["metrics"]["test"]["accuracy"] <= 1
        reopened = opening.open_run(directory, trained=True)
        again = reopened.task.evaluate(
            reopened.model, fixed_batches(reopened.task, reopened.splits.test, 4, CPU)
        )
        assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_an_easy_task_is_learned_to_the_end(tmp_path: Path) -> None:
    """The colour of the picture is the answer, and the words say nothing."""
    folder = qwen_folder(tmp_path / "qwen", hidden_size=32)
    data = write_scienceqa(tmp_path / "data", counts=(24, 6, 12))
    task = make(folder, data, image_size=28, questions="with_image")
    splits, model = task.splits(0), task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = task.collate(list(splits.train))
    for _ in range(80):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    found = task.test_metrics(model, splits.test, 5)
    assert found["accuracy"] == 1
    assert found["accuracy_with_image"] == found["accuracy_natural_science"] == 1
    assert "accuracy_without_image" not in found


@pytest.mark.data
def test_a_small_qwen_trains_on_the_real_pictures(qwen: Path) -> None:
    """The loss falls from that of a uniform guess over 263 tokens."""
    task = make(qwen, real("scienceqa"), max_length=400, image_size=56, train_examples=16,
                validation_examples=8, test_examples=4)  # fmt: skip
    splits, model = task.splits(0), task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = task.evaluate(model, fixed_batches(task, splits.validation, 8, CPU))["loss"]
    for batch in fixed_batches(task, splits.train, 4, CPU):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    after = task.evaluate(model, fixed_batches(task, splits.validation, 8, CPU))["loss"]
    assert before == pytest.approx(np.log(263), abs=0.3)
    assert after < before - 0.5


# -- VizWiz -----------------------------------------------------------------------------------------------


def test_vizwiz(qwen: Path, vizwiz: Path) -> None:
    task = make(qwen, vizwiz, dataset="vizwiz", validation_examples=4)
    assert task.describe()["examples"] == {"train": 12, "validation": 4, "test": 8}
    held = {q.key for q in task.parts["validation"]}
    assert not held & {q.key for q in task.parts["train"]}
    assert {q.answer for q in task.parts["test"]} == {"red", "green", "blue", "unanswerable"}
    model, test = task.build_model(0), task.splits(0).test
    found = task.test_metrics(model, test, 8)
    assert set(found) == {"accuracy", "answerability_ap", "answerability_f1"}
    assert found["accuracy"] == 0
    assert 0 < found["answerability_ap"] <= 1


# -- texts too long ---------------------------------------------------------------------------------------


def test_long_contexts_are_cut_and_counted_and_answers_never(qwen: Path, data: Path, tmp_path: Path) -> None:
    problems = json.loads((data / "problems.json").read_text())
    for problem in problems.values():
        if problem["split"] == "test":
            problem["hint"] = "word " * 60
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "images").symlink_to(data / "images")
    task = make(qwen, folder, max_length=200)
    assert task.describe()["truncated"] == {"train": 0, "validation": 0, "test": 9}
    whole = make(qwen, folder, max_length=600).splits(0).test
    for cut, longer in zip(task.splits(0).test, whole, strict=True):
        assert 200 - len(" word") <= len(cut["input_ids"]) <= 200 < len(longer["input_ids"])
        assert [t for t in cut["labels"] if t != IGNORED] == [t for t in longer["labels"] if t != IGNORED]
        text = task._encoder.tokenizer.decode(cut["input_ids"])
        assert all(f"{letter}. {colour}" in text for letter, colour in zip("ABC", ("red", "green", "blue"),
                                                                          strict=True))  # fmt: skip
    assert "image, choices and answer alone have more than 40 tokens" in refused(
        make(qwen, folder, max_length=40).fingerprint
    )
