"""Studies are as studies/PROTOCOL.md says, texts are divided cleanly, pilots leave test data alone."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flatbench import optim, study, tasks
from flatbench.errors import InputError
from flatbench.tasks.images.digits import Digits

STUDIES = Path(__file__).parents[1] / "studies"
PROTOCOL = (STUDIES / "PROTOCOL.md").read_text(encoding="utf-8")
#: rows of the protocol's table of studies, by name
ROWS = {
    cells[2].strip("` "): [cell.strip() for cell in cells]
    for line in PROTOCOL.splitlines()
    if re.match(r"\| \d \| `", line) and (cells := line.split("|"))
}
VARIABLES = "variables={data: folder, encoder: folder, model: folder}"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ROWS)
def test_studies_are_as_the_protocol_lists_them(name: str) -> None:
    loaded = study.load(name, [] if name.startswith("digits") else [VARIABLES])
    _, _, _, _, sizes, _, methods, trials, seeds, _ = ROWS[name]
    assert len(loaded.file.methods) == int(methods)
    assert len(loaded.file.seeds) == int(seeds.split()[0])
    assert min(loaded.file.seeds) == 10
    if trials == "none":
        assert loaded.file.tune is None
    else:
        tune = loaded.file.tune
        assert tune is not None
        assert tune.seeds == [100, 101, 102]
        assert not set(tune.seeds) & set(loaded.file.seeds)
        for condition in loaded.conditions:
            found = {len(condition.trials[method.name]) for method in condition.methods}
            assert f"{found.pop()} × {len(tune.seeds)}" == trials
            assert not found
            names = [method.name for method in condition.methods]
            assert names[0] == "lora"
            assert name == "digits-methods" or names[1] == "eflat_lora"
    if name == "digits-power":
        given = Digits(**{k: v for k, v in loaded.conditions[0].task.items() if k.endswith("_size")}).sizes
        assert sizes == " / ".join(str(given[part]) for part in ("train", "validation", "test"))


def test_digits_studies_hold_every_method_and_adapter() -> None:
    conditions = [study.load(name).conditions for name in ("digits-power", "digits-methods")]
    assert [c.task for c in conditions[0]] == [c.task for c in conditions[1]]
    methods = [method for found in conditions for method in found[0].methods]
    assert {method.optimizer["name"] for method in methods} == set(optim.REGISTRY.names())
    adapters = [method.adapter for method in methods]
    assert {a.init for a in adapters} >= {True, "pissa", "olora"}
    assert any(a.dora for a in adapters)
    assert any(a.rslora for a in adapters)


def questions(folder: Path) -> Path:
    """TREC's layout: 120 questions in three classes, some of them twice, and 6 to test."""
    kinds = ("ABBR:exp", "ENTY:animal", "DESC:manner")
    lines = [f"{kinds[i % 3]} What is number {i} ?" for i in range(120)]
    lines += [f"{kinds[0]} what  IS number 0 ?", lines[5]]  # as others are, but for case and spaces
    test = [lines[7], *(f"{kinds[i % 3]} Who was number {i} ?" for i in range(5))]
    for name, content in (("train_5500", lines), ("TREC_10", test)):
        (folder / f"{name}.label").write_text("\n".join(content) + "\n", encoding="latin-1")
    return folder


def test_no_text_is_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = script("text_files"), questions(tmp_path)
    for folder in ("once", "again"):
        sizes = ["--train", "30", "--validation", "24"]
        monkeypatch.setattr(sys, "argv", ["", "trec", str(data), str(tmp_path / folder), *sizes])
        module.main()
    frames = {n: pd.read_csv(tmp_path / "once" / f"{n}.csv") for n in ("train", "validation", "test")}
    assert {name: len(frame) for name, frame in frames.items()} == {
        "train": 30,
        "validation": 24,
        "test": 6 + 119 - 54,  # the published ones, and what is left of the 119 that are not among them
    }
    texts = Counter(" ".join(t.lower().split()) for frame in frames.values() for t in frame["text"])
    assert set(texts.values()) == {1}
    assert set(frames["train"]["label"]) == {"ABBR", "ENTY", "DESC"}
    assert frames["train"]["label"].value_counts().between(9, 11).all()
    for name in frames:
        assert (tmp_path / "once" / f"{name}.csv").read_bytes() == (
            tmp_path / "again" / f"{name}.csv"
        ).read_bytes()


def test_more_texts_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["", "trec", str(questions(tmp_path)), str(tmp_path / "out"), "--train", "500"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match="train: 500 asked for, but only 119"):
        script("text_files").main()


TINY = """
name: tiny
task: {name: digits, train_size: 20, validation_size: 20, test_size: 20}
model: {hidden_size: 8, layers: 1, heads: 1, patch_size: 4, pretrain_epochs: 0}
methods: [lora, {name: eflat_lora, grid: {lr: [1e-3], rho: [0.1, 0.2]}}]
train: {steps: 2, threads: 1}
tune: {grid: {lr: [1e-3, 2e-3]}, seeds: [100]}
seeds: [10]
measures: [balancedness]
"""


@pytest.mark.slow
def test_a_pilot_leaves_the_test_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("pilot")
    (tmp_path / "tiny.yaml").write_text(TINY)
    given = ["", str(tmp_path / "tiny.yaml"), str(tmp_path / "out"), "--methods", "lora", "eflat_lora"]
    monkeypatch.setattr(sys, "argv", [*given, "--seeds", "100"])
    with pytest.raises(InputError, match=r"--seeds: \[100\] are the study's own"):
        module.main()
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="learning rates at the edge of their grid: lora; widen"):
        module.main()
    runs = [*(tmp_path / "out/tiny/runs").iterdir()]
    assert len(runs) == 4
    loaded = study.load(str(tmp_path / "tiny.yaml"))
    planned = study.plan.Plan(loaded, module.StudyFolder(tmp_path / "out", "tiny"))
    assert {run.id for run in planned.tuning} == {run.name for run in runs}  # flatbench run goes on from them
    for run in runs:
        assert set(module.RunDirectory(run).result()["metrics"]) == {"validation"}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*given, "--seeds", "9001", "9002", "--measure"])
    with pytest.raises(SystemExit):
        module.main()
    told = capsys.readouterr().out
    assert re.search(r"eflat_lora - lora, metric: [+-]\d\.\d{4}, SD \d\.\d{4} \(2 seeds\)", told)
    assert "log eigenvalue" not in told  # the study measures none
    assert len([*(tmp_path / "out/tiny/runs").glob("*/measures/balancedness.json")]) == 4


@pytest.mark.slow
def test_baselines_are_the_most_frequent_class_and_models_at_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, pilot = script("baselines"), script("pilot")
    (tmp_path / "tiny.yaml").write_text(TINY)
    given = ["", str(tmp_path / "tiny.yaml"), str(tmp_path / "out")]
    loaded = study.load(str(tmp_path / "tiny.yaml"))
    planned = study.plan.Plan(loaded, pilot.StudyFolder(tmp_path / "out", "tiny"))
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(InputError, match="no method 'lora' with final runs"):
        module.main()  # nothing is tuned, so that nothing is chosen
    for run in planned.tuning:
        planned.folder.run(run.id).prepare(run.spec())
        pilot.finish(planned.folder.run(run.id).path)
    with pytest.raises(InputError, match="final runs are not finished"):
        module.main()
    final = planned.final(planned.selection())
    for run in final:
        planned.folder.run(run.id).prepare(run.spec())
        pilot.finish(planned.folder.run(run.id).path)
    monkeypatch.setattr(sys, "argv", [*given, "--output", str(tmp_path / "baselines.csv")])
    module.main()
    assert "most frequent class" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "baselines.csv").set_index(["baseline", "metric"])["mean"]
    task = tasks.load(loaded.conditions[0].task, loaded.conditions[0].model)
    splits = task.splits(loaded.file.seeds[0])
    labels = [int(task.collate([each])["labels"]) for each in splits.test]
    counts = Counter(int(task.collate([each])["labels"]) for each in splits.train)
    best = min(label for label, count in counts.items() if count == max(counts.values()))
    assert table["most frequent class", "accuracy"] == pytest.approx(labels.count(best) / len(labels))
    assert table["untrained model", "accuracy"] < 0.6
