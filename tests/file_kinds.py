"""Folders of files of every kind that flatbench reads, and what reads them."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from flatbench import report, store
from flatbench.cli import status
from flatbench.config import accelerate
from flatbench.config.sections import AdapterOptions
from flatbench.errors import FlatbenchError as Refused
from flatbench.models import adapt, convert, folders, pretrained, weights
from flatbench.models.pretrained import PretrainedModel
from flatbench.orchestration import site
from flatbench.report.analysis import archive
from flatbench.report.tables import published
from flatbench.runs import remeasure
from flatbench.store import RunDirectory, StudyFolder, claims, events, training_state
from flatbench.tasks.common import frames
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.images import clip_data, image_data
from flatbench.tasks.text import glue_data, prompt_data
from flatbench.tasks.text.text_classification import TextClassification
from flatbench.tasks.vqa import data as vqa_data
from tests.report import synthetic
from tests.tasks import task_cases, vqa_cases


@dataclass(frozen=True, repr=False)
class Kind:
    """Files as they should be, by their paths within a folder, and what reads that folder."""

    files: dict[str, bytes]
    read: Callable[[Path], object]
    #: endings of the files to damage; all if empty
    damaged: tuple[str, ...] = ()

    @property
    def targets(self) -> list[str]:
        return [name for name in self.files if not self.damaged or name.endswith(self.damaged)]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# -- what is read -----------------------------------------------------------------------------------------


def kinds(root: Path) -> dict[str, Kind]:
    """Every kind of file that flatbench reads, small. Args: root: an empty folder to make them in."""
    found = {**_tables(root), **_published(root), **_pictures(root), **_models(root), **_results(root)}
    yaml = b"executor: {name: local, jobs: 2}\nretries: 1\nlease: 60\n"
    found["site"] = Kind({"site.yaml": yaml}, lambda f: site.read(f / "site.yaml"))
    yaml = (
        b"compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n"
        b"mixed_precision: bf16\nnum_processes: 2\n"
    )
    found["accelerate"] = Kind({"a.yaml": yaml}, lambda f: accelerate.read(str(f / "a.yaml")))
    row = "{task: {name: glue, task: rte}, metric: accuracy, values: {lora: 70.1}}"
    yaml = f"source: a paper\ntables:\n- setup: {{r: 8}}\n  rows: [{row}]\n".encode()
    found["published"] = Kind({"p.yaml": yaml}, lambda f: published.load_publications([f / "p.yaml"]))
    return found


def _tables(root: Path) -> dict[str, Kind]:
    def parts(name: str) -> Callable[[Path], object]:
        def read(folder: Path) -> object:
            model = PretrainedModel(name_or_path="none/none")
            task = TextClassification(model=model, train=str(folder / name))
            return task.parts, task.source_digest()

        return read

    found = {}
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        content = task_cases.write_reviews(root / f"a.{ending}").read_bytes()
        found[ending] = Kind({f"a.{ending}": content}, parts(f"a.{ending}"))
    packed = gzip.compress(found["csv"].files["a.csv"])
    found["csv.gz"] = Kind({"a.csv.gz": packed}, parts("a.csv.gz"))

    def scores(folder: Path) -> object:
        return frames.read_frame("train", str(folder / "a.parquet"), ["text", "label"])

    frame = pd.DataFrame({"text": ["a", None], "label": [1.5, 2.0], "more": [[1, 2], [3]]})
    frame.to_parquet(root / "b.parquet")
    found["nested"] = Kind({"a.parquet": (root / "b.parquet").read_bytes()}, scores)
    return found


def _published(root: Path) -> dict[str, Kind]:
    rte = contents(task_cases.write_rte(root / "rte", 12, 6))
    gsm8k = contents(task_cases.write_gsm8k(root / "gsm8k", 6, 3))
    row = {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}
    snli = {name: json.dumps(row).encode() + b"\n" for name in prompt_data.FILES["snli"].values()}
    sst5 = dict.fromkeys(prompt_data.FILES["sst5"].values(), b'0,"a, b"\n4,c\n')
    trec = dict.fromkeys(prompt_data.FILES["trec"].values(), b"DESC:x what ?\nNUM:y how many ?\n")
    e2e = {
        names[0]: b'mr,ref\n"name[A], food[B]",A has B.\n'
        for names in generation_data.SOURCES["e2e"].files.values()
    }
    found = {
        "rte": Kind(rte, lambda f: glue_data.read("rte", str(f), None)),
        "e2e": Kind(e2e, lambda f: generation_data.read("e2e", str(f), None)),
        "gsm8k": Kind(gsm8k, lambda f: generation_data.read("gsm8k", str(f), None)),
    }
    for name, files in (("snli", snli), ("sst5", sst5), ("trec", trec)):
        found[name] = Kind(files, lambda f, name=name: prompt_data.read(name, str(f), None))  # type: ignore[misc]
    return found


def _pictures(root: Path) -> dict[str, Kind]:
    def look(sources: Any) -> None:
        for pictures in sources[1].values():
            pictures.check(range(len(pictures)))
            pictures.image(0)

    pixels = Image.new("RGB", (6, 5), (200, 10, 10))
    images = {}
    for number, form in enumerate(("png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm")):
        made = io.BytesIO()
        pixels.save(made, form)
        images[f"train/{'ab'[number % 2]}/{number}.{form}"] = made.getvalue()
    idx = {}
    for split in image_data.IDX.values():
        idx[f"{split}-images-idx3-ubyte"] = struct.pack(">iiii", 0x803, 4, 3, 2) + bytes(range(24))
        idx[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">ii", 0x801, 4) + bytes([0, 1] * 2))
    part = [["0.png", 0, "cat"], ["1.png", 1, "a_dog"]]
    split = {"split.json": json.dumps(dict.fromkeys(("train", "val", "test"), part)).encode()}
    split |= {f"images/{n}.png": images["train/a/0.png"] for n in range(2)}

    def ask(questions: Any) -> None:
        for part in questions.values():
            vqa_data.digest(part)
            for question in part:
                if question.picture is not None:
                    question.picture.size(), question.picture.open()

    science = contents(vqa_cases.write_scienceqa(root / "science", counts=(3, 1, 2)))
    problems = json.loads(science["problems.json"])
    rows = [
        {**row, "pid": pid, "image": row["image"] and f"{row['split']}/{pid}/image.png"}
        for pid, row in problems.items()
    ]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in science.items():
            if name.startswith("images/"):
                file.writestr(name.removeprefix("images/"), content)
    lines = {"problems.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
    viz = contents(vqa_cases.write_vizwiz(root / "viz", counts=(2, 2)))
    return {
        "images": Kind(images, lambda f: look(image_data.read(str(f), None, None, "image", "label"))),
        "idx": Kind(idx, lambda f: look(image_data.read(str(f), None, None, "image", "label"))),
        "split": Kind(split, lambda f: look(clip_data.read_split(f / "split.json", f / "images"))),
        "problems": Kind(science, lambda f: ask(vqa_data.read_scienceqa(f)), ("json",)),
        "zip": Kind({**lines, "images.zip": archive.getvalue()}, lambda f: ask(vqa_data.read_scienceqa(f))),
        "annotations": Kind(viz, lambda f: ask(vqa_data.read_vizwiz(f)), ("json",)),
    }


def _models(root: Path) -> dict[str, Kind]:
    bert = task_cases.bert_folder(root / "bert", BertForSequenceClassification, num_hidden_layers=1)
    base = BertForSequenceClassification.from_pretrained(bert)
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(copy.deepcopy(base), options).save_pretrained(root / "adapter")
    fit = {"name": "lora", "r": 2, "alpha": 4}

    def adapter(folder: Path) -> object:
        with contextlib.suppress(Refused):
            adapt.start_digest(AdapterOptions(**fit, init_from=str(folder)))
        with contextlib.suppress(Refused):
            weights.check(folder)
        return folders.open_folder(folder, base)

    def model(folder: Path) -> object:
        own = PretrainedModel(name_or_path=str(folder))
        with contextlib.suppress(Refused):
            folders.open_folder(folder)
        with contextlib.suppress(Refused):
            folders.tokenizer([str(folder)])
        configuration = pretrained.config(own)
        tokenizer = pretrained.tokenizer(own)
        pretrained.check_vocabulary(own, configuration, tokenizer)
        pretrained.longest_input(configuration)
        return pretrained.load(own, AutoModelForSequenceClassification, configuration, 0)

    pickled = {"config.json": contents(bert)["config.json"]}
    made = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, made)
    pickled["pytorch_model.bin"] = made.getvalue()

    def converted(folder: Path) -> object:
        return convert.convert(str(folder), folder / "out")

    training_state.save(root / "state.safetensors", {"start": "x", "step": 3, "weights": [torch.ones(2)]})
    state = {"s.safetensors": (root / "state.safetensors").read_bytes()}
    return {
        "adapter": Kind(contents(root / "adapter"), adapter, ("json", "safetensors")),
        "model": Kind(contents(bert), model, ("json", "safetensors", "txt")),
        "pickle": Kind(pickled, converted, ("bin",)),
        "state": Kind(state, lambda f: training_state.load(f / "s.safetensors")),
    }


def _results(root: Path) -> dict[str, Kind]:
    folder = synthetic.make(root / "results", seeds=(0,), methods=("lora",))
    for run in folder.directories():
        events.record(run.path, "begun", jobs=1)
        if run.state() == "done":
            run.finish([])
    run = folder.directories()[-1]
    claim = claims.take(run.path)
    assert claim is not None
    own = contents(run.path)
    claim.release()
    one = {f"runs/{run.id}/{name}": content for name, content in own.items()}
    listed = json.loads(contents(folder.path)["study.json"])
    listed["runs"] = [place for place in listed["runs"] if place["id"] == run.id]
    listed["selection"] = []
    del listed["sha256"]
    older = {**one, "study.json": json.dumps(listed).encode(), f"runs/{run.id}/done.json": b"{}"}
    one["study.json"] = json.dumps({**listed, "sha256": store.digest(listed)}).encode()
    rebuilt = {name: content for name, content in older.items() if name != "study.json"}

    def study(place: Path) -> object:
        results = StudyFolder(place.parent, place.name)
        for directory in [RunDirectory(path) for path in sorted((place / "runs").iterdir())]:
            for ask in (directory.settled, directory.state, directory.progress, directory.heal):
                with contextlib.suppress(Refused):
                    ask()
            events.read(directory.path), claims.holder(directory.path)
            with contextlib.suppress(Refused):
                list(remeasure.measure([directory.path], ["none"]))
        status.tables(status.survey(results))
        return report.Results.load(results)

    def table(place: Path) -> object:
        results = StudyFolder(place.parent, place.name)
        status.tables(status.survey(results))
        return report.Results.load(results)

    report.Results.load(folder)
    archive.save(report.Results.load(folder), root / "archive")
    return {
        "run": Kind(one, table),
        "healed": Kind(one, study),
        "older": Kind(older, study),
        "rebuilt": Kind(rebuilt, table),
        "archive": Kind(contents(root / "archive"), lambda f: report.open_results(str(f))),
    }
