"""Every block of code in README, CONTRIBUTING and docs/ does what it says.

Python runs, block after block in a page's own namespace, on small models. YAML is read by what reads it: a
study, a site file, accelerate's, published figures. Of a command it is checked that the command, its options
and the files it names are there. A comment in a page's source prepares a block
(``<!-- invisible-code: python … -->``) or says why it cannot run
here (``<!-- skip: next "needs a GPU" -->``).
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import SkipTest

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
import typer.main
import yaml
from torch import nn

import flatbench
from flatbench.cli import app
from flatbench.config import accelerate as accelerate_options
from flatbench.config import study_files
from flatbench.errors import InputError
from flatbench.orchestration import site
from flatbench.report import load_publications
from flatbench.report.figures import style
from flatbench.study import Study
from tests.conftest import SMALL
from tests.report.conftest import sketch
from tests.tasks.task_cases import bert_folder

sybil = pytest.importorskip("sybil", reason="pip install 'flatbench-lora[dev]'")

from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
STUDY = {"name": "page", "task": {"name": "digits"}, "methods": ["lora"], "seeds": [0]}


def lora() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=4,
        patch_size=2,
        num_channels=1,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def on_a_model() -> dict[str, Any]:
    """A LoRA model with a batch of data."""
    model = lora()
    batch = {"pixel_values": torch.randn(6, 1, 4, 4), "labels": torch.arange(6) % 2}
    return {
        "torch": torch,
        "transformers": transformers,
        "accelerator": accelerate.Accelerator(cpu=True),
        "model": model,
        "trainable": [p for p in model.parameters() if p.requires_grad],
        "batch": batch,
        "batches": [batch],
        "loss": lambda model, batch: model(**batch).loss,
    }


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small study called quickstart, and its results."""
    folder = tmp_path_factory.mktemp("quickstart")
    content = {**SMALL, "name": "quickstart", "description": "small", "methods": ["lora", "sam"]}
    (folder / "studies").mkdir()
    (folder / "studies/quickstart.yaml").write_text(yaml.safe_dump(content))
    flatbench.run(str(folder / "studies/quickstart.yaml"), folder / "results", quiet=True)
    return folder


def with_texts(folder: Path) -> None:
    """An adapter of a model of texts, and a data set on disk."""
    bert_folder(folder / "bert", transformers.BertForSequenceClassification, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    peft.get_peft_model(model, config).save_pretrained(folder / "my-adapter")
    texts = {"uid": [1, 2, 3], "premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]}
    datasets.Dataset.from_dict({**texts, "gold": ["no", "yes", "maybe"]}).save_to_disk(folder / "nli")


def prepare(
    page: str, folder: Path, patch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """What a page's Python finds: names, files in the working directory."""
    patch.chdir(folder)
    patch.setattr(study_files, "folder", lambda: folder / "studies")
    patch.setattr(style, "save", sketch)
    run = flatbench.run  # without processes, whose numbers are the same
    patch.setitem(vars(flatbench), "run", lambda *a, jobs=1, **k: run(*a, **{**k, "quiet": True}))
    if page in TRAINS:
        shutil.copytree(request.getfixturevalue("quickstart"), folder, dirs_exist_ok=True)
    if page == "docs/reports.md":
        flatbench.report("quickstart", "reports")
    if page == "docs/landscape.md":
        with_texts(folder)
        return {"datasets": datasets}
    return {"__name__": "page", **on_a_model()}


def of_a_study(content: dict[str, Any], page: dict[str, Any]) -> None:
    """Sections of a study, checked with those that the page showed before and a task that they suit."""
    model = {"model": {"name_or_path": "encoder"}}
    if "task" in content:
        before = model
    else:
        texts = {"task": {"name": "glue", "task": "rte"}} if "model" in content else {}
        before = page.get("_study", texts)
    page["_study"] = {**STUDY, **before, **content}
    Study(page["_study"], "page")


def read_by(text: str, reader: Callable[[Path], object]) -> None:
    path = Path("page.yaml")
    path.write_text(text, encoding="utf-8")
    reader(path)


def yaml_block(example: Any) -> None:
    """Read by what reads it: told by its first keys."""
    text = str(example.parsed)
    keys = set(yaml.safe_load(text))
    if keys & {"executor", "trackers"}:
        read_by(text, site.read)
    elif "distributed_type" in keys:
        read_by(text, lambda path: accelerate_options.read(str(path)))
    elif "tables" in keys:
        read_by(text, lambda path: load_publications([path]))
    else:
        content = yaml.safe_load(text)
        content.get("train", {}).pop("accelerate", None)  # the file is the page's next block
        of_a_study(content, example.namespace)


def commands(text: str) -> list[list[str]]:
    """The commands of a block: lines after a ``$``, or all of them where there is no prompt."""
    lines = [line for line in text.splitlines() if line.startswith("$ ")] or text.splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def command_block(example: Any) -> None:
    for words in commands(str(example.parsed)):
        if words:
            understood(words)


def understood(words: list[str]) -> None:
    """That a command, its options and what it names are there."""
    program, *rest = words
    if program == "flatbench":
        root: Any = typer.main.get_command(app)
        named = root.commands[rest[0]]
        named.make_context(rest[0], rest[1:])  # parses, and calls nothing
        if rest[0] in ("run", "show", "doctor", "report") and rest[1].islower() and "/" not in rest[1]:
            assert (ROOT / "studies" / f"{rest[1]}.yaml").is_file(), rest[1]
    elif program == "make":
        assert all(re.search(rf"^[^\n#:=]*\b{re.escape(x)}\b[^\n=]*:", MAKEFILE, re.M) for x in rest), words
    elif program in ("python", ".venv/bin/python"):
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "pip":
        for extra in re.findall(r"flatbench-lora\[(.*?)\]", " ".join(rest)):
            assert all(re.search(rf"^{x} = \[", PROJECT, re.M) for x in extra.split(",")), extra
    else:
        pytest.fail(f"no check for the command {program}")


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def nothing(example: Any) -> None:
    """TOML is read by test_extending, BibTeX is no code."""


LANGUAGES: dict[str, Callable[[Any], None]] = {
    "yaml": yaml_block,
    "console": command_block,
    "sh": command_block,
    "toml": nothing,
    "bibtex": nothing,
}
#: pages whose Python trains or measures for longer than a second
TRAINS = ("README.md", "docs/landscape.md", "docs/reports.md")


def parsed(page: str) -> Any:
    parsers = [CodeBlockParser(name, check) for name, check in LANGUAGES.items()]
    return sybil.Sybil([*parsers, PythonCodeBlockParser(), SkipParser()]).parse(ROOT / page)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in TRAINS else page for page in PAGES]
)
def test_blocks_do_what_they_say(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    document, skipped = parsed(page), []
    examples = list(document.examples())
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        if re.search(r"^```(python|yaml)$", (ROOT / page).read_text(encoding="utf-8"), re.M):
            document.namespace.update(prepare(page, tmp_path, patch, request))
        for example in examples:
            try:
                example.evaluate()
            except SkipTest as reason:
                skipped.append(str(reason))
    assert all(skipped)


def test_no_block_is_left_out() -> None:
    """Every fence names a language that is checked, or shows what is no code (output, a tree of files)."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        opened = re.findall(r"^```(.*)$", text, re.M)[::2]
        assert set(opened) <= {"", "python", *LANGUAGES}, page
        known = sum(1 for example in parsed(page).examples() if not isinstance(example.parsed, tuple))
        invisible = len(re.findall(r"^<!-- invisible-code", text, re.M))
        assert known - invisible == sum(1 for name in opened if name), page


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("$ flatbench show quickstart --gpus h100", "gpus"),
        ("$ flatbench run quickstrat", "quickstrat"),
        ("$ make quickly", "quickly"),
        ("$ python studies/smal_models.py qwen_vl out", "smal_models"),
        ("$ pip install 'flatbench-lora[slrum]'", "slrum"),
    ],
)
def test_commands_that_are_not_there_are_found(text: str, what: str) -> None:
    with pytest.raises(Exception, match=what):
        for words in commands(text):
            understood(words)


def test_yaml_that_no_study_takes_is_found() -> None:
    with pytest.raises(InputError, match="epoch"):
        of_a_study({"train": {"epoch": 3}}, {})
