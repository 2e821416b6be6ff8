"""Questions about images: layouts of files, the hub, and what is refused before training."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.vqa import data as vqa_data
from flatbench.tasks.vqa.vqa import VQA
from tests.tasks.task_cases import bert_folder
from tests.tasks.vqa_cases import FOLDERS, make, picture, qwen_folder, refused, write_scienceqa, write_vizwiz


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("vqa") / "qwen")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scienceqa(tmp_path_factory.mktemp("scienceqa"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": 3}, "problem 1: answer 3 is not one of its 3 choices (0 to 2)"),
        ({"answer": None}, "problem 1: no 'answer'"),
        ({"answer": "A"}, "problem 1: answer 'A' is not one of its 3 choices"),
        ({"choices": []}, "problem 1: no 'choices'"),
        ({"question": ""}, "problem 1: no 'question'"),
        ({"split": "dev"}, "problem 1: unknown split 'dev'"),
        ({"image": "other.png"}, "problem 1: its image is missing: "),
        ({"image": "x" * 300}, "is too long for a file's name"),
        ({"hint": ["a"]}, "problem 1: 'hint' is no text"),
        ({"subject": [[]]}, "problem 1: 'subject' is no text"),
        ({"question": "<|image_pad|>?"}, "question 1: its text holds <|image_pad|>"),
    ],
)
def test_rows_that_are_wrong(qwen: Path, data: Path, tmp_path: Path, changes: Any, said: str) -> None:
    problems = json.loads((data / "problems.json").read_text())
    problems["1"] |= changes
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "images").symlink_to(data / "images")
    assert said in refused(make(qwen, tmp_path).fingerprint)


def test_an_image_whose_name_is_no_text(tmp_path: Path) -> None:
    data = write_scienceqa(tmp_path / "data", counts=(2, 1, 1))
    problems = json.loads((data / "problems.json").read_text())
    lines = [json.dumps({**row, "pid": pid, "image": [[]]}) for pid, row in problems.items()]
    (data / "problems.jsonl").write_text("\n".join(lines))
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        archive.writestr("a.png", b"")
    assert "its image [[]] is not in" in refused(lambda: vqa_data.read("scienceqa", str(data), None))


def test_a_picture_that_does_not_decode(qwen: Path, tmp_path: Path) -> None:
    data = write_scienceqa(tmp_path / "data", counts=(6, 3, 3))
    path = data / "images" / "train" / "1" / "image.png"
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: does not decode as an image: " in refused(make(qwen, data).fingerprint)
    path.write_bytes(b"no image")
    assert f"{path}: does not decode as an image: of no known format" in refused(make(qwen, data).fingerprint)


def test_answers_that_are_missing_in_vizwiz(tmp_path: Path) -> None:
    data = write_vizwiz(tmp_path / "data")
    rows = json.loads((data / "val.json").read_text())
    del rows[1]["answers"]
    (data / "val.json").write_text(json.dumps(rows))
    assert "val.json, question 2: no 'answers'" in refused(lambda: vqa_data.read("vizwiz", str(data), None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 1025}, "max_length: 1025 is more than the model's 1024 positions"),
        ({"train_examples": 25}, "train_examples: 25 asked for, but only 24 are there"),
        ({"data": "/nowhere/at/all"}, "data: no such folder: /nowhere/at/all"),
        ({"data": None}, "data: derek-thomas/ScienceQA: neither a local folder nor to be had from the hub"),
        ({"data": None, "dataset": "vizwiz"}, "data: vizwiz: no data set of the hub is known"),
    ],
)
def test_bad_options(qwen: Path, data: Path, options: dict[str, Any], said: str) -> None:
    standard = {"data": str(data), "dataset": "scienceqa", "instruction": ""}
    task = VQA(model=PretrainedModel(name_or_path=str(qwen)), **{**standard, **options})
    assert said in refused(task.fingerprint)


def test_models_that_do_not_fit(qwen: Path, data: Path, tmp_path: Path) -> None:
    assert "a model of type 'bert' does not answer questions about images" in refused(
        make(bert_folder(tmp_path / "bert"), data).fingerprint
    )
    other = qwen_folder(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    assert "the place of an image is token 261 to the processor and 5 to the model" in refused(
        make(other, data).fingerprint
    )
    (other / "config.json").write_text(json.dumps(config))
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": 16}))
    assert "patch_size is 16 to the processor and 14 to the model" in refused(make(other, data).fingerprint)
    (other / "preprocessor_config.json").unlink()
    assert "no processor of images and text" in refused(make(other, data).fingerprint)


def test_code_beside_a_model_is_refused(qwen: Path, data: Path, tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "chat")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_qwen.py").write_text("raise SystemExit\n")
    assert "it needs code of its own, which is never run" in refused(make(folder, data).fingerprint)


def test_a_model_of_the_hub_offline(data: Path) -> None:
    model = PretrainedModel(name_or_path="nobody/no-such-model")
    message = refused(VQA(model=model, dataset="scienceqa", data=str(data)).fingerprint)
    assert "neither a local folder nor to be had from the hub" in message


def test_places_that_the_model_has_no_features_for(tmp_path: Path, data: Path) -> None:
    """What the files alone do not tell is said in one line at the first step."""
    folder = FOLDERS["idefics"](tmp_path / "idefics")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"image_seq_len": 2}))
    task = make(folder, data)
    batch = task.collate(list(task.splits(0).train)[:2])
    assert "its processor does not fit the model" in refused(lambda: task.loss(task.build_model(0), batch))


def test_rows_of_the_hub(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    image = str(picture(tmp_path / "a.png", "red", generator))
    columns = {
        "image": [image, None],
        "question": ["Colour?", "Which?"],
        "choices": [["red", "blue"]] * 2,
        "answer": [0, 1],
        "hint": ["", "It is blue."],
        "subject": ["natural science"] * 2,
    }
    split = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    found = vqa_data.read("scienceqa", None, "r1")
    first, second = found["test"]
    assert second.picture is None
    assert first.picture is not None
    assert first.picture.open().size == (60, 40)
    assert (second.answer, second.context, first.traits["subject"]) == ("B", "It is blue.", "natural science")
    assert VQA(
        model=PretrainedModel(name_or_path=str(qwen)), dataset="scienceqa", revision="r1"
    ).fingerprint()


def test_fingerprint_follows_pictures_and_answers(qwen: Path, tmp_path: Path) -> None:
    data = write_scienceqa(tmp_path / "data", counts=(6, 3, 3))
    seen = [make(qwen, data).fingerprint()]
    assert make(qwen, data).fingerprint() == seen[0]
    Image.new("RGB", (60, 40)).save(data / "images" / "test" / "10" / "image.png")
    seen.append(make(qwen, data).fingerprint())
    text = (data / "problems.json").read_text()
    (data / "problems.json").write_text(text.replace('"answer": 1', '"answer": 2', 1))
    seen.append(make(qwen, data).fingerprint())
    seen.append(make(qwen, data, questions="with_image").fingerprint())
    assert len(set(seen)) == 4


def test_lines_with_an_archive(tmp_path: Path) -> None:
    row = {"pid": "7", "split": "train", "question": "?", "choices": ["a", "b"], "answer": 1, "hint": "",
           "image": "x.png"}  # fmt: skip
    rows = [row, {**row, "pid": "8", "split": "test", "image": None}, {**row, "pid": "9", "split": "val"}]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = picture(tmp_path / "x.png", "red", np.random.default_rng(0))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(path, "x.png")
    found = vqa_data.read("scienceqa", str(tmp_path), None)
    shown = found["train"][0].picture
    assert shown is not None
    assert shown.size() == shown.open().size == (60, 40)
    assert [found[s][0].picture is None for s in ("validation", "test")] == [False, True]
    (tmp_path / "problems.jsonl").write_text(json.dumps({**row, "image": "y.png"}) + "\n")
    assert "problem 7: its image y.png is not in " in refused(
        lambda: vqa_data.read("scienceqa", str(tmp_path), None)
    )
