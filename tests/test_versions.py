"""Results of another version of a study than its file says are not reported without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatbench import study
from flatbench.cli.versions import told
from flatbench.config import study_files
from flatbench.store import StudyFolder
from flatbench.study.schema import StudyFile


def ran(results: Path, name: str, *overrides: str) -> None:
    """What `flatbench run` leaves in a folder to say which study it was."""
    loaded = study.load(name, overrides, unset=True)
    folder = StudyFolder(results, loaded.name)
    folder.prepare()
    folder.write({"study": loaded.file.model_dump(mode="json"), "runs": []})


@pytest.mark.parametrize("name", sorted(study_files.predefined()))
def test_the_same_version_is_no_other(tmp_path: Path, name: str) -> None:
    ran(tmp_path, name)
    assert told(name, tmp_path) == ""


def test_what_differs_is_named(tmp_path: Path) -> None:
    ran(tmp_path, "quickstart", "train.epochs=2", "seeds=[7, 8]", "task.test_size=99")
    found = told("quickstart", tmp_path)
    assert "another version than" in found
    for option in ("train.epochs", "seeds", "task.test_size"):
        assert option in found


def test_an_option_that_only_the_file_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path / "results", "quickstart")
    text = study_files.find("quickstart")[0].read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    Path("edited.yaml").write_text(text)
    assert told("edited.yaml", Path("results")) == ""
    Path("edited.yaml").write_text(
        text.replace("task: {name: digits,", "task: {name: digits, split_seed: 5,")
    )
    assert "(task.split_seed differ)" in told("edited.yaml", Path("results"))


def test_variables_that_were_given_are_no_other_version(tmp_path: Path) -> None:
    given = ("variables.data=local/trec", "variables.encoder=local/encoder")
    loaded = study_files.read("trec-minilm", given)[0]
    folder = StudyFolder(tmp_path, "trec-minilm")
    folder.prepare()
    folder.write({"study": StudyFile.model_validate(loaded).model_dump(mode="json"), "runs": []})
    assert told("trec-minilm", tmp_path) == ""


def test_a_study_that_comes_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose adapters are others once the first, whose file has changed, is run again; in a circle too."""
    monkeypatch.chdir(tmp_path)
    text = study_files.find("quickstart")[0].read_text("utf-8").replace("name: quickstart", "name: first")
    (tmp_path / "first.yaml").write_text(text + "\nafter: second.yaml\n")
    other = text.replace("name: first", "name: second")
    (tmp_path / "second.yaml").write_text(other + "\nafter: first.yaml\n")
    for name in ("first", "second"):
        folder = StudyFolder(Path("results"), name)
        folder.prepare()
        content = StudyFile.model_validate(study_files.read(f"{name}.yaml")[0]).model_dump(mode="json")
        folder.write({"study": content, "runs": []})
    assert told("first.yaml", Path("results")) == told("second.yaml", Path("results")) == ""
    first = (tmp_path / "first.yaml").read_text("utf-8")
    (tmp_path / "first.yaml").write_text(first.replace("\nseeds: [0, 1,", "\nseeds: [9, 1,"))
    assert "(seeds differ)" in told("first.yaml", Path("results"))
    found = told("second.yaml", Path("results"))
    assert found.startswith("second.yaml comes after first.yaml, which `flatbench run` would run anew")
    assert "(seeds differ)" in found


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert told("quickstart", tmp_path) == ""
    assert told("no-such-study", tmp_path) == ""
