"""The papers' studies start: data and models in the hub's layouts, with only the download replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
)
from typer.testing import CliRunner

from flatbench import cli, store, study
from flatbench.config import study_files
from flatbench.estimate import checkup
from flatbench.runs.finish import finish
from flatbench.study import plan
from flatbench.study.run import Run
from flatbench.tasks.images import clip_data
from flatbench.tasks.text.prompt_data import DATA
from tests.hub_cases import Hub, connect, publish
from tests.tasks.clip_cases import write_split
from tests.tasks.task_cases import byte_vocabulary, clip_folder, gpt2_folder
from tests.tasks.vqa_cases import qwen_folder, write_scienceqa, write_vizwiz
from tests.test_small_studies import script

pytestmark = pytest.mark.slow

STUDIES = [
    name
    for name in study_files.predefined()
    if name.startswith(("paper-", "gsm8k")) and not name.endswith("-small")
]


def roberta_folder(folder: Path) -> Path:
    """A random RoBERTa whose tokenizer has a token a byte and, as the real one, one a label word."""
    folder.mkdir(parents=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*special[:4], *(token for token in byte_vocabulary() if token != "<|endoftext|>")]
    merges = []
    for word in sorted({word for data in DATA.values() for word in data.words}):
        piece = "Ġ"
        for letter in word:
            if piece + letter not in tokens:
                tokens.append(piece + letter)
                merges.append(f"{piece} {letter}")
            piece += letter
    tokens.append("<mask>")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=len(tokens), max_position_embeddings=514, **size, **marks)
        RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    gpt2_folder(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **size, **marks)).save_pretrained(folder)
    return folder


def long_gpt2_folder(folder: Path) -> Path:
    return gpt2_folder(folder, GPT2LMHeadModel, n_positions=1024)


def t5_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    script().t5(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "FacebookAI/roberta-large": roberta_folder,
    "openai-community/gpt2-medium": long_gpt2_folder,
    "openai-community/gpt2-large": long_gpt2_folder,
    "openai/clip-vit-base-patch16": clip_folder,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen_folder,
    "meta-llama/Llama-2-7b-hf": llama_folder,
    "google-t5/t5-base": t5_folder,
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The hub with tiny models, and the folders that studies of images want."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    for name, make in MODELS.items():
        publish(hub, name, make(hub.root / "made" / name.replace("/", "--")))
    files = hub.root / "files"
    for name in clip_data.DATA:
        (files / name).mkdir(parents=True)
        write_split(files / name, name)
    write_scienceqa(files / "scienceqa")
    write_vizwiz(files / "vizwiz")
    return hub


@pytest.fixture(autouse=True)
def online(there: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return connect(there, monkeypatch)


def sized(name: str, hub: Hub) -> study.Study:
    """A study as it is, but for sizes of splits that tiny data does not have."""
    content, source = study_files.read(name, [f"variables.data={hub.root / 'files'}"])
    task = dict(content["task"])
    for option in ("train_examples", "validation_examples", "test_examples"):
        if task.get(option):
            task[option] = 6
    if "shots" in task:
        task["shots"] = 3
    if task.get("generation"):
        task["generation"] = {**task["generation"], "max_new_tokens": 4, "metrics": ["bleu"]}
    if task["name"] == "vqa":
        task |= {"image_size": 56, "max_new_tokens": 3, "max_length": 1024}  # of the tiny model's positions
    return study.Study({**content, "task": task, "tune": None, "seeds": [0], "measures": []}, source)


def started(runs: list[Run], folder: store.StudyFolder) -> None:
    """Each run trains for one epoch and reaches its end."""
    for run in runs:
        config: Any = run.config
        train = {key: value for key, value in config["train"].items() if key != "steps"}
        config["train"] = {**train, "epochs": 1, "threads": 1}
        directory = folder.run(run.id)
        directory.prepare(run.spec())
        failure = directory.path / "failure.json"
        where = f"{run.study}, {run.condition}, {run.method}"
        assert finish(directory.path) == "done", f"{where}: {failure.read_text()}"
        result = directory.result()
        assert result is not None
        assert result["metrics"]["test"], where


def of_methods(planned: plan.Plan, every: bool) -> list[Run]:
    """A run a condition and method, or one for some conditions, with the methods by turns."""
    first = {(run.condition, run.method): run for run in planned.final([])}
    runs = list(first.values())
    if every:
        return runs
    conditions = list(dict.fromkeys(run.condition for run in runs))
    conditions = conditions[:: max(1, len(conditions) // 3)]  # of CLIP's fifteen three
    methods = list(dict.fromkeys(run.method for run in runs))
    return [first[c, methods[i % len(methods)]] for i, c in enumerate(conditions)]


@pytest.mark.parametrize("name", STUDIES)
def test_every_condition_trains_in_the_hubs_layout(name: str, there: Hub, tmp_path: Path) -> None:
    folder = store.StudyFolder(tmp_path, name)
    planned = plan.Plan(sized(name, there), folder)
    started(of_methods(planned, every=False), folder)
    if name == "paper-few-shot":  # tiny TREC has four questions of each class
        assert any(
            "task.task=trec: fewer examples than shots for validation: ABBR" in n for n in planned.notes
        )


def said(hub: Hub, monkeypatch: pytest.MonkeyPatch, *command: str, code: int = 0) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    found = CliRunner().invoke(cli.app, list(command), catch_exceptions=False)
    assert found.exit_code == code, found.output
    return found.output


@pytest.mark.parametrize(
    "name",
    [name if name == "paper-few-shot" else pytest.param(name, marks=pytest.mark.long) for name in STUDIES],
)
def test_show_and_doctor(name: str, there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded to show a study; doctor fetches a few rows, and finds all that is wanted."""
    monkeypatch.chdir(tmp_path)
    there.asked.clear()
    shown = said(there, monkeypatch, "show", name)
    assert "runs: " in shown
    assert "on this machine, one after the other, measures included" in shown
    costs = said(there, monkeypatch, "show", name, "--gpu", "h100")
    assert "GPU hours" in costs
    assert "results: about " in costs
    assert there.asked == []
    folder = ["--set", f"variables.data={there.root / 'files'}"]
    files = folder if name in ("paper-clip", "paper-vqa", "paper-rho") else []
    sizes = {
        "paper-few-shot": ["--set", "task.shots=3"],
        "paper-vqa": ["--set", "task.validation_examples=4"],
        "paper-rho": ["--set", "task.validation_examples=4"],
    }
    # the machine of a user with a GPU: full fine-tuning writes a hundred gigabytes
    plenty = SimpleNamespace(free=10**13, available=10**13)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda place: plenty)
    monkeypatch.setattr(checkup.psutil, "virtual_memory", lambda: plenty)
    healthy = said(there, monkeypatch, "doctor", name, *files, *sizes.get(name, []))
    assert "NO  " not in healthy
    assert "configuration, tokenizer, safetensors" in healthy


def test_doctor_says_what_is_not_to_be_had(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, wanted in (
        ("task.revision=main", "main holds a loading script, which is never run; say revision: "),
        ("task.columns={label: gold}", "no column 'gold' for label; it has text, "),
        ("task.data=nobody/there", "neither a local folder nor to be had from the hub"),
        ("model.name_or_path=nobody/there", "cannot load its configuration"),
    ):
        asked = ["doctor", "paper-few-shot", "--set", "grid={task.task: [trec]}", "--set", text]
        assert f"NO  {'model' if 'model' in text else 'data'}" in (
            found := said(there, monkeypatch, *asked, code=1)
        )
        assert wanted in found
    weights = next((there.root / "models" / "models--FacebookAI--roberta-large").rglob("model.safetensors"))
    kept = weights.read_bytes()
    weights.rename(weights.with_suffix(".bin"))
    try:
        found = said(
            there, monkeypatch, "doctor", "paper-few-shot", "--set", "grid={task.task: [trec]}", code=1
        )
        assert "no *.safetensors in its revision 'main'" in found
        assert "flatbench convert FacebookAI/roberta-large --output DIR" in found
    finally:
        weights.write_bytes(kept)


@pytest.mark.long
@pytest.mark.parametrize("name", STUDIES)
def test_every_method_trains_in_the_hubs_layout(name: str, there: Hub, tmp_path: Path) -> None:
    folder = store.StudyFolder(tmp_path, name)
    started(of_methods(plan.Plan(sized(name, there), folder), every=True), folder)
