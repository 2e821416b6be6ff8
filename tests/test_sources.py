"""What studies and tasks take from the hub: one table, its layouts, and a line for whatever goes wrong."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError

import flatbench
from flatbench.config import sources, study_files
from flatbench.errors import InputError
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.images import image_data
from flatbench.tasks.text import glue_data, prompt_data
from flatbench.tasks.vqa import data as vqa_data
from tests.hub_cases import Hub, connect, hub  # noqa: F401 - a fixture

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z][\w.-]+")
KNOWN = {entry.name for entry in (*sources.DATA, *sources.MODELS)}


@pytest.fixture(autouse=True)
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:  # noqa: F811
    hub.fails.clear()
    hub.moved.clear()
    hub.asked.clear()
    return connect(hub, monkeypatch)


# -- the table --------------------------------------------------------------------------------------------


def names_in_studies() -> Iterator[tuple[str, str]]:
    for path in study_files.predefined().values():
        stack: list[Any] = [study_files._content(path, path.name)]
        while stack:
            node = stack.pop()
            if isinstance(node, dict):
                stack += [value for key, value in node.items() if key != "description"]
            elif isinstance(node, list):
                stack += node
            elif isinstance(node, str) and NAME.fullmatch(node):
                yield node, path.name


def names_in_code(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                yield node.value, path.name


def test_every_name_in_studies_and_tasks_is_in_the_table() -> None:
    code = Path(flatbench.__file__).parent / "tasks"
    found = [*names_in_studies(), *names_in_code(code)]
    assert {"FacebookAI/roberta-large", "derek-thomas/ScienceQA", "CogComp/trec"} <= {
        name for name, _ in found
    }
    assert [(name, place) for name, place in found if name not in KNOWN] == []


def test_the_table_is_whole() -> None:
    for entry in (*sources.DATA, *sources.FILES.values()):
        assert entry.splits
        assert min(entry.splits.values()) > 0
        assert entry.columns
        assert entry.licence
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.checked)
        assert entry.counts == () or sum(entry.counts) == entry.splits["train"]
        assert entry.tokens[0] < entry.tokens[1]
    for task, layout in glue_data.LAYOUTS.items():
        known = sources.data(glue_data.HUB, task)
        assert known is not None
        assert len(known.labels) == len(layout.labels)
    for prompted in prompt_data.DATA.values():
        known = sources.data(*prompted.hub)
        assert known is not None
        assert {"train", prompted.test} <= set(known.splits)
        assert len(known.labels) == len(prompted.labels)
    for source in generation_data.SOURCES.values():
        known = sources.data(*source.hub)
        assert known is not None
        assert {*source.fields.values(), source.reference} == set(known.columns)


# -- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", glue_data.LAYOUTS)
def test_glue_as_the_hub_has_it(task: str, hub: Hub) -> None:  # noqa: F811
    found = glue_data.read(task, glue_data.HUB, None)
    assert set(found) == {"train", *glue_data.LAYOUTS[task].dev}
    known = sources.data(glue_data.HUB, task)
    assert known is not None
    texts = len(known.columns) - 1
    for rows in found.values():
        assert all(len(row) == texts for row in rows.texts)
        assert set(rows.labels) == set(range(len(known.labels))) or (
            not known.labels and max(rows.labels) > 4
        )
    assert {configuration for _, configuration, _, _ in hub.asked} == {task}


@pytest.mark.parametrize("task", prompt_data.DATA)
def test_prompts_as_the_hub_has_them(task: str, hub: Hub) -> None:  # noqa: F811
    found = prompt_data.read(task, None, None)
    assert set(found) == {"train", "test"}
    for rows in found.values():
        assert set(rows.labels) == set(range(len(prompt_data.DATA[task].labels)))
        assert rows.incomplete == (1 if task == "snli" else 0)
    assert {revision for _, _, revision, _ in hub.asked} == {sources.PARQUET if task == "trec" else None}


@pytest.mark.parametrize("name", generation_data.SOURCES)
def test_texts_to_generate_as_the_hub_has_them(name: str, hub: Hub) -> None:  # noqa: F811
    found = generation_data.read(name, None, None)
    assert set(found) == set(generation_data.SOURCES[name].files)
    assert all(len(pairs) == 24 for pairs in found.values())
    assert {revision for _, _, revision, _ in hub.asked} == {sources.PARQUET if name == "e2e" else None}


def test_scienceqa_as_the_hub_has_it() -> None:
    found = vqa_data.read("scienceqa", None, None)
    assert set(found) == {"train", "validation", "test"}
    for questions in found.values():
        assert [q.picture is None for q in questions] == [False] * 6 + [True] * 6
        assert questions[0].picture.open().size == (28, 28)  # type: ignore[union-attr]
        assert questions[4].answer == "B"


def test_trec_by_its_other_name_has_the_same_classes() -> None:
    """Its own numbers stand in another order, and would give every class another's word."""
    usual, other = (prompt_data.read("trec", name, None)["train"] for name in (None, "SetFit/TREC-QC"))
    assert other.labels == usual.labels
    mapped = prompt_data.read("trec", "SetFit/TREC-QC", None, {"label": "label_coarse"})["train"]
    assert mapped.labels != usual.labels


# -- columns ----------------------------------------------------------------------------------------------


def renamed(hub: Hub, name: str, table: Dataset, split: str = "train") -> None:  # noqa: F811
    """A repository that nobody knows, with one table as train and test."""
    folder = hub.root / name.replace("/", "--")
    shutil.rmtree(folder, ignore_errors=True)
    for part in (split, "validation", "test"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(folder / "data" / f"{part}-00000-of-00001.parquet"))
    hub.moved[name, None] = folder


def test_columns_are_mapped_in_every_family(hub: Hub) -> None:  # noqa: F811
    texts = Dataset.from_dict({"phrase": ["a", "b"], "gold": [1, 0]})
    renamed(hub, "me/texts", texts)
    columns = {"text": "phrase", "label": "gold"}
    assert prompt_data.read("sst2", "me/texts", None, columns)["train"].labels == (1, 0)
    one = hub.root / "me--glue" / "sst2"
    for split in ("train", "validation"):
        one.mkdir(parents=True, exist_ok=True)
        texts.to_parquet(str(one / f"{split}.parquet"))
    hub.moved["me/glue", None] = one.parent
    (one.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: sst2\n  data_files:\n  - {split: train, path: sst2/train*}\n"
        "  - {split: validation, path: sst2/validation*}\n---\n"
    )
    assert glue_data.read("sst2", "me/glue", None, columns)["train"].texts == (("a",), ("b",))
    renamed(hub, "me/meanings", Dataset.from_dict({"meaning": ["m"], "said": ["s"]}))
    found = generation_data.read("e2e", "me/meanings", None, {"mr": "meaning", "ref": "said"})
    assert found["test"].references == ("s",)
    scienceqa = hub.load_dataset("derek-thomas/ScienceQA")["train"]
    other = scienceqa.rename_columns({"question": "asked", "image": "shown", "answer": "right"})
    renamed(hub, "me/questions", other)
    roles = {"question": "asked", "image": "shown", "answer": "right"}
    questions = vqa_data.read("scienceqa", "me/questions", None, roles)["train"]
    assert [q.answer for q in questions] == [
        q.answer for q in vqa_data.read("scienceqa", None, None)["train"]
    ]
    pictures = Dataset.from_dict(
        {"picture": scienceqa["image"][:6], "kind": [0, 1] * 3},
        features=Features({"picture": datasets.Image(), "kind": ClassLabel(names=["no", "yes"])}),
    )
    renamed(hub, "me/pictures", pictures)
    named = image_data.image_columns("image", "label", {"image": "picture", "label": "kind"})
    assert image_data.read("me/pictures", None, None, *named)[0] == ("no", "yes")


def test_columns_of_files(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("phrase\tgold\na\t1\n")
    columns = {"text": "phrase", "label": "gold"}
    assert glue_data.read("sst2", str(tmp_path), None, columns)["train"].labels == (1,)
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / f"{name}.csv").write_text("meaning,said\nm,s\n")
    pairs = generation_data.read("e2e", str(tmp_path), None, {"mr": "meaning", "ref": "said"})
    assert pairs["train"].references == ("s",)
    for call in (
        lambda: glue_data.read("cola", str(tmp_path), None, columns),
        lambda: prompt_data.read("trec", str(tmp_path), None, columns),
    ):
        assert refused(call).startswith("columns: ")


def test_classes_are_told_by_their_names_in_any_order(hub: Hub) -> None:  # noqa: F811
    names = ["NUM", "LOC", "HUM", "ENTY", "DESC", "ABBR"]
    features = Features({"text": Value("string"), "coarse_label": ClassLabel(names=names)})
    table = Dataset.from_dict({"text": list("abcdef"), "coarse_label": [0, 1, 2, 3, 4, 5]}, features=features)
    renamed(hub, "me/trec", table)
    usual = {"label": "coarse_label"}
    assert prompt_data.read("trec", "me/trec", None, usual)["train"].labels == (5, 4, 3, 1, 2, 0)
    texts = Dataset.from_dict(
        {"text": ["a", "b"], "label": ["Entailment", "not_entailment"], "other": ["c", "d"]}
    )
    renamed(hub, "me/rte", texts)
    columns = {"text": "text", "text_pair": "other"}
    assert prompt_data.read("rte", "me/rte", None, columns)["train"].labels == (0, 1)


# -- what can go wrong ------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_failure_has_a_line_of_its_own_with_the_remedy(hub: Hub) -> None:  # noqa: F811
    def trec(data: str | None = None, revision: str | None = None) -> Any:
        return lambda: prompt_data.read("trec", data, revision)

    said = {
        "script": refused(trec(revision="main")),
        "configuration": refused(lambda: glue_data.read("sst2", "openai/gsm8k", None)),
        "column": "",
        "texts": "",
        "damaged": "",
        "gated": "",
        "private": "",
        "revision": "",
        "network": refused(trec("some/where")),
    }
    assert (
        "main holds a loading script, which is never run; say revision: refs/convert/parquet"
        in said["script"]
    )
    assert "was run" not in said["script"]
    assert "no configuration 'sst2'; it has main, socratic" in said["configuration"]
    assert "neither a local folder nor to be had from the hub" in said["network"]
    assert said["network"].endswith("with no network, give a folder of the published files")
    renamed(hub, "me/texts", Dataset.from_dict({"text": ["a"], "coarse_label": ["who"]}))
    said["column"] = refused(lambda: generation_data.read("gsm8k", "me/texts", None))
    assert "no column 'question' for question; it has text, coarse_label" in said["column"]
    said["column"] = refused(lambda: prompt_data.read("trec", "me/texts", None, {"label": "class"}))
    said["texts"] = refused(lambda: prompt_data.read("trec", "me/texts", None))
    for key, message in (
        ("gated", "Dataset 'me/gated' is a gated dataset on the Hub. Visit the page to ask for access."),
        ("private", "Dataset 'me/private' doesn't exist on the Hub or cannot be accessed."),
        ("revision", "Revision 'v9' doesn't exist for dataset 'me/revision' on the Hub."),
    ):
        hub.fails[f"me/{key}", "v9"] = DatasetNotFoundError(message)
        said[key] = refused(trec(f"me/{key}", "v9"))
    assert "it is gated: accept its terms on the hub and log in (`hf auth login`)" in said["gated"]
    assert "not on the hub, or it is private" in said["private"]
    assert "no revision 'v9' on the hub" in said["revision"]
    assert (
        "no column 'class' for label; it has text, coarse_label; say which it is, as columns:"
        in said["column"]
    )
    assert "column 'coarse_label' holds texts, as 'who', and not the classes ABBR" in said["texts"]
    assert "name the column of these, as columns: {label: …}" in said["texts"]
    (hub.moved["me/texts", None] / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    hub.moved["me/texts", "v2"] = hub.moved["me/texts", None]
    said["damaged"] = refused(lambda: prompt_data.read("trec", "me/texts", "v2"))
    assert "its files are damaged, or do not fit together" in said["damaged"]
    assert len(set(said.values())) == len(said)


def test_a_split_that_was_renamed(hub: Hub) -> None:  # noqa: F811
    table = Dataset.from_dict({"text": ["a"], "label": [0]})
    folder = hub.root / "me--split"
    (folder / "data").mkdir(parents=True)
    for part in ("train", "validation"):
        table.to_parquet(str(folder / "data" / f"{part}-00000-of-00001.parquet"))
    hub.moved["me/split", None] = folder
    found = refused(lambda: prompt_data.read("sst5", "me/split", None))
    assert "data: me/split: no split 'test'; it has train, validation; the split was renamed" in found
    assert "say revision: with a commit that has it, or give a folder of the published files" in found


def test_unknown_purposes_of_columns() -> None:
    for call in (
        lambda: glue_data.read("sst2", glue_data.HUB, None, {"txet": "a"}),
        lambda: generation_data.read("e2e", None, None, {"text": "a"}),
        lambda: vqa_data.read("scienceqa", None, None, {"picture": "a"}),
        lambda: image_data.image_columns("image", "label", {"picture": "a"}),
    ):
        assert "columns: unknown '" in refused(call)
