"""What a study, a checkpoint or a message must not be able to do."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

import flatbench
from flatbench import store, study, tasks
from flatbench.config.registry import options_model
from flatbench.errors import InputError
from flatbench.models import weights
from flatbench.models.pretrained import PretrainedModel, fingerprint
from flatbench.runs.finish import finish
from flatbench.security import paths, remote_code
from flatbench.security.secrets import REDACTED, redacted
from flatbench.study import plan
from flatbench.tasks.common import hub
from flatbench.tasks.images import clip_data
from flatbench.tasks.text.text_classification import TextClassification
from flatbench.tasks.vqa import data as vqa_data
from tests.conftest import SMALL
from tests.tasks.task_cases import bert_folder, write_reviews
from tests.test_cli import invoke

SECRET = "s3cr3t-value-of-the-environment"


@pytest.fixture(autouse=True)
def no_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (paths.VARIABLE, remote_code.VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is put back whatever a test does to it
        monkeypatch.delenv(name)


# -- paths ------------------------------------------------------------------------------------------------


def text_study(folder: Path, **files: str) -> Path:
    """A study on a file of its own; planning it reads model and data."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": "own",
        "task": {"name": "text_classification", "train": "train.csv", **files},
        "model": {"name_or_path": "bert"},
        "methods": ["lora"],
        "seeds": [0],
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "own.yaml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder beside it that a study has no business in."""
    (tmp_path / "private").mkdir()
    write_reviews(tmp_path / "private" / "reviews.csv")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "path",
    [
        "../private/reviews.csv",
        "{here}/../private/reviews.csv",
        "{private}/reviews.csv",
        "link/reviews.csv",
        "inner/../link/../private/reviews.csv",
        "~root/reviews.csv",
        "~/reviews.csv",
        "/etc/passwd",
        "/",
    ],
)
def test_a_path_that_leaves_is_refused_with_its_field(here: Path, path: str) -> None:
    (here / "inner").mkdir()
    (here / "link").symlink_to(here.parent / "private")
    path = path.format(here=here, private=here.parent / "private")
    with pytest.raises(InputError) as error:
        study.load(str(text_study(here, train=path)))
    message = str(error.value)
    assert f"task.train: {path} lies outside" in message
    assert f"--root {path}" in message


def test_a_link_before_dots_is_followed_as_the_system_does(here: Path) -> None:
    """``link/..`` is not the folder that holds the link: by its text the path is inside, by its place not."""
    (here / "link").symlink_to(here.parent / "private")
    write_reviews(here.parent / "reviews.csv")
    assert (here / "link/../reviews.csv").is_file()
    with pytest.raises(InputError, match=r"task\.train: link/\.\./reviews\.csv lies outside"):
        study.load(str(text_study(here, train="link/../reviews.csv")))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"grid": {"task.test": ["../a.csv", "b.csv"]}}, "task.test"),
        ({"grid": {"model": [{"name_or_path": "../other"}]}}, "model.name_or_path"),
        ({"model": {"name_or_path": "/srv/models/bert"}}, "model.name_or_path"),
        ({"variables": {"x": "/etc"}, "model": {"name_or_path": "${x}"}}, "model.name_or_path"),
    ],
)
def test_every_place_that_can_name_a_path_is_looked_at(
    here: Path, section: dict[str, Any], field: str
) -> None:
    file = text_study(here)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **section}))
    with pytest.raises(InputError, match=rf"own\.yaml: {field}: .* lies outside"):
        study.load(str(file))


def test_what_the_user_names_is_allowed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = here.parent / "private" / "reviews.csv"
    file = text_study(here, train=str(outside))
    assert study.load(str(file), roots=[outside.parent])
    assert study.load(str(file), [f"task.train={outside}"])
    assert study.load(str(file), [f"variables.folder={outside.parent}"])
    with pytest.raises(InputError):
        study.load(str(file), [f"variables.folder={outside.parent}x"])
    monkeypatch.setenv(paths.VARIABLE, f"/nowhere{os.pathsep}{outside.parent}")
    assert study.load(str(file))
    monkeypatch.delenv(paths.VARIABLE)
    assert study.Study(yaml.safe_load(file.read_text()), "own").conditions  # a program's own content


def test_a_study_elsewhere_reads_beside_itself_and_here(here: Path) -> None:
    sent = here.parent / "sent"
    for place in (sent, here):
        assert study.load(str(text_study(sent, train=str(place / "reviews.csv"))))


@pytest.mark.slow
def test_the_command_line_takes_roots(here: Path) -> None:
    bert_folder(here / "bert")
    file = text_study(here, train=str(here.parent / "private" / "reviews.csv"))
    code, text = invoke("show", str(file))
    assert code == 2
    assert "task.train" in text
    code, text = invoke("show", str(file), "--root", str(here.parent / "private"))
    assert code == 0, text


def test_the_paths_text_is_what_is_hashed(here: Path) -> None:
    """The ids of runs that are there already do not depend on who may read what."""
    bert_folder(here / "bert")
    write_reviews(here / "train.csv")
    file = text_study(here)
    (run, *_) = plan.Plan(study.load(str(file)), store.StudyFolder(here, "own")).final([])
    assert run.config["task"]["train"] == "train.csv"
    assert run.config["model"] == {
        "name_or_path": "bert",
        "revision": None,
        "dtype": "float32",
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("name", tasks.REGISTRY.names())
def test_every_task_marks_the_options_that_are_paths(name: str) -> None:
    """An option whose documentation or name speaks of files is one that roots are checked for."""
    suspicious = {
        "data",
        "split_file",
        "train",
        "validation",
        "test",
        "name_or_path",
        "path",
        "folder",
        "file",
    }
    model = tasks.model_options(name)
    for options in (options_model(tasks.REGISTRY.load(name)), model):
        filled = options.model_construct(**dict.fromkeys(options.model_fields, "x"))
        marked = {place.rpartition(".")[2] for place, _ in paths.named_paths(filled, "task")}
        assert marked == suspicious & set(options.model_fields)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "a/../../x.png", "a\0b"])
def test_files_that_data_names_stay_in_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    row = [name, 0, "cat"]
    (tmp_path / "split.json").write_text(json.dumps({"train": [row], "val": [row], "test": [row]}))
    with pytest.raises(InputError, match="lies outside"):
        clip_data.read_split(tmp_path / "split.json", tmp_path / "images")
    problem = {"question": "?", "choices": ["a", "b"], "answer": 0, "split": "train", "image": name}
    (tmp_path / "problems.json").write_text(json.dumps({"../../../..": problem}))
    with pytest.raises(InputError, match="lies outside"):
        vqa_data.read_scienceqa(tmp_path)
    (tmp_path / "problems.jsonl").write_text(json.dumps({"pid": 1, **problem}) + "\n")
    with pytest.raises(InputError, match="lies outside"):
        vqa_data.read_scienceqa(tmp_path)
    answers = [{"answer": "x", "answer_confidence": "yes"}] * 10
    question = {"image": name, "question": "?", "answers": answers, "answerable": 1, "answer_type": "other"}
    (tmp_path / "train.json").write_text(json.dumps([question]))
    with pytest.raises(InputError, match="lies outside"):
        vqa_data.read_vizwiz(tmp_path)


@pytest.mark.parametrize("reader", ["pandas", "csv", "imagefolder", "json"])
def test_a_reader_is_not_the_name_of_a_data_set(reader: str) -> None:
    with pytest.raises(InputError, match="not the name of a data set"):
        hub.load(reader, None, revision=None, instead="…")


# -- code that comes with a model -------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import BertConfig

Path({mark!r}).write_text("ran")


class OwnConfig(BertConfig):
    model_type = "own-bert"
"""


@pytest.fixture
def with_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BERT whose configuration is a class in a file beside it, which leaves a mark when it runs."""
    folder = bert_folder(here / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-bert", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CODE.format(mark=str(here / "mark")))
    monkeypatch.setattr(constants, "HF_HOME", str(here.parent))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here.parent / "modules"))
    return folder


def asking(here: Path) -> Path:
    write_reviews(here / "train.csv")
    file = text_study(here)
    content = yaml.safe_load(file.read_text())
    content["model"]["trust_remote_code"] = True
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_code_of_a_model_runs_only_if_the_user_names_the_model(here: Path, with_code: Path) -> None:
    mark = here / "mark"
    code, text = invoke("show", str(text_study(here)))
    assert code == 2
    assert not mark.exists()
    file = asking(here)
    for named in ([], ["--trust-remote-code", "other"]):
        code, text = invoke("show", str(file), *named)
        assert code == 2
        assert "model.trust_remote_code" in text
        assert "--trust-remote-code bert" in text
        assert not mark.exists()
    with pytest.raises(InputError, match="trust_remote_code"):
        PretrainedModelTask(trust_remote_code=True)
    assert not mark.exists()
    invoke("show", str(file), "--trust-remote-code", "bert")
    assert mark.read_text() == "ran"
    mark.unlink()
    # the permission is for the program that was given it
    code, _ = invoke("show", str(file))
    assert code == 2
    assert remote_code.granted() == frozenset()


def PretrainedModelTask(**options: Any) -> Any:  # noqa: N802
    model = PretrainedModel(name_or_path="bert", **options)
    return TextClassification(model=model, train="train.csv").fingerprint()


def test_permission_is_recorded_and_workers_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    remote_code.grant(["b", "a"])
    assert json.loads(os.environ[remote_code.VARIABLE]) == ["a", "b"]
    with remote_code.granting(["c"]):
        remote_code.check("c")
        remote_code.check("a")
    with pytest.raises(InputError, match="--trust-remote-code c"):
        remote_code.check("c")
    remote_code.grant([])
    assert remote_code.VARIABLE not in os.environ
    monkeypatch.setenv(remote_code.VARIABLE, "{")
    with pytest.raises(InputError, match="JSON list"):
        remote_code.granted()


def test_the_code_is_a_part_of_the_model(with_code: Path) -> None:
    trusted = PretrainedModel(name_or_path=str(with_code), trust_remote_code=True)
    before = fingerprint(trusted, None), fingerprint(PretrainedModel(name_or_path=str(with_code)), None)
    (with_code / "configuration_own.py").write_text("changed = 1\n")
    after = fingerprint(trusted, None), fingerprint(PretrainedModel(name_or_path=str(with_code)), None)
    assert before[0] != after[0]
    assert before[1] == after[1]


# -- pickles ----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_refused_unread(here: Path) -> None:
    mark = here / "exploded"
    folder = bert_folder(here / "bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    write_reviews(here / "train.csv")
    task = TextClassification(model=PretrainedModel(name_or_path="bert"), train="train.csv")
    with pytest.raises(InputError, match="safetensors"):
        task.build_model(0)
    with pytest.raises(InputError, match="pickled weights are not opened"):
        flatbench.load_checkpoint(folder)
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (here / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match="pickled weights are not opened"):
        flatbench.load_checkpoint(here / "adapter")
    with pytest.raises(InputError, match="only safetensors files are read"):
        weights.check(here / "adapter")
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it would have


# -- secrets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"401 for token {SECRET}!", f"401 for token {REDACTED}!"),
        ("https://me:pass@host/x", f"https://{REDACTED}@host/x"),
        ("https://s3/x?X-Amz-Signature=ab12&part=3", f"https://s3/x?X-Amz-Signature={REDACTED}&part=3"),
        ("Authorization: Bearer abcdefgh.ijk", f"Authorization: Bearer {REDACTED}"),
        ("hf_" + "a1" * 15 + " is wrong", f"{REDACTED} is wrong"),
        ("loss 0.5 at step 3 of /data/x@y: short", "loss 0.5 at step 3 of /data/x@y: short"),
    ],
)
def test_redaction(monkeypatch: pytest.MonkeyPatch, text: str, kept: str) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", SECRET)
    monkeypatch.setenv("OTHER_KEY", "a")  # too short to look for: it is in every text
    assert redacted(text) == kept


def test_no_secret_of_the_environment_is_in_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "MY_SECRET", "DATABASE_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{name}-{SECRET}")
    monkeypatch.setenv("HARMLESS_VARIABLE", f"plain-{SECRET}")
    monkeypatch.setenv("HOSTNAME", "name-of-this-machine")
    content = {**SMALL, "methods": ["lora", "sam"], "train": {**SMALL["train"], "epochs": 1}}
    folder = store.StudyFolder(tmp_path / "results", "small")
    good, bad = plan.Plan(study.Study(content, "s"), folder).final([])
    for run in (good, bad):
        folder.run(run.id).prepare(run.spec())
    assert finish(folder.run(good.id).path) == "done"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(f"401: https://user:{os.environ['HF_TOKEN']}@hub/x, {os.environ['MY_SECRET']}")

    monkeypatch.setattr("flatbench.runs.resume.Trainer", fail)
    assert finish(folder.run(bad.id).path) == "failed"
    failure = json.loads((folder.run(bad.id).path / "failure.json").read_text())
    assert failure["error"] == f"OSError: 401: https://{REDACTED}@hub/x, {REDACTED}"
    assert "Traceback" in failure["traceback"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        raw = path.read_bytes()
        assert SECRET.encode() not in raw, path
        assert b"name-of-this-machine" not in raw, path
    environment = folder.run(good.id).environment()
    assert environment is not None
    assert set(environment) <= {
        *("versions", "git_commit", "system", "processor", "cores", "threads", "device", "jobs"),
        *("restarted", "trust_remote_code"),
    }
