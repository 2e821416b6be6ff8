"""The command line as a person uses it: exit codes, messages, files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import flatbench
from flatbench import cli, store
from flatbench.models import weights
from flatbench.store import RunDirectory, StudyFolder
from tests import warm
from tests.conftest import SMALL


def invoke(*arguments: str) -> tuple[int, str]:
    """The program in this process, with `main`'s treatment of errors."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["flatbench", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue() + err.getvalue()


@pytest.fixture
def study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tuned study of two methods and two seeds was run."""
    folder = tmp_path_factory.mktemp("finished")
    content = {
        **SMALL,
        "methods": ["lora", {"name": "sam", "grid": {"lr": [1e-2], "rho": [0.05, 0.1]}}],
        "tune": {"grid": {"lr": [1e-3, 1e-2]}, "seeds": [9]},
        "seeds": [0, 1],
        "measures": [{"name": "sam_sharpness", "examples": 30}, {"name": "slice", "points": 3}, "cost"],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = warm.completed("run", "small.yaml", "--jobs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "lora: chosen on validation" in done.stdout
    assert "[4/4]" in done.stdout
    return folder


@pytest.mark.parametrize("command", ["list", "show", "run", "measure", "report", "doctor"])
def test_help_carries_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"flatbench {command}" in result.output
    assert "Example" in result.output


def test_list_describes_everything() -> None:
    code, text = invoke("list")
    assert code == 0
    from flatbench import executors, measures, optim, tasks
    from flatbench.config import study_files

    for registry in (tasks.REGISTRY, optim.REGISTRY, measures.REGISTRY, executors.REGISTRY):
        for name in registry.names():
            assert name in text
            description = registry.describe(name)
            assert description.endswith(".")
            assert description[:20] in text
    for name in study_files.predefined():
        assert name in text
    assert "Offline, minutes on two cores" not in text  # a sentence a study; `show` tells the rest


@pytest.mark.parametrize("width", ["60", "80"])
def test_list_cuts_no_name(width: str) -> None:
    from flatbench import optim
    from flatbench.config import study_files

    text = CliRunner().invoke(cli.app, ["list"], env={"COLUMNS": width}).output
    assert max(map(len, text.splitlines())) <= int(width)
    first = [line.split(" ")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert {*study_files.predefined(), *optim.REGISTRY.names()} <= set(first)


def test_doctor() -> None:
    code, text = invoke("doctor")
    assert code == 0
    assert "torch" in text
    assert "cores" in text
    assert "extra [dev]: complete" in text


def test_doctor_asks_an_image_model_for_no_tokenizer(tmp_path: Path) -> None:
    from tests.tasks.task_cases import vit_folder, write_images

    vit_folder(tmp_path / "vit")
    write_images(tmp_path / "data", {"train": 12, "test": 5})
    study = {
        "name": "images",
        "task": {"name": "image_classification", "data": str(tmp_path / "data")},
        "model": {"name_or_path": str(tmp_path / "vit")},
        "adapter": {"name": "lora", "r": 2},
        "methods": ["lora"],
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.01},
        "seeds": [0],
    }
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    _, text = invoke("doctor", str(tmp_path / "images.yaml"))
    assert "tokenizer" not in text
    assert "model.name_or_path" in text


@pytest.mark.slow
def test_python_m_flatbench() -> None:
    command = [sys.executable, "-m", "flatbench", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert flatbench.__version__ in done.stdout


def test_doctor_names_versions_outside_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatbench.cli import listing

    needs = ["one>=2.0", "two>=1.1,<2", "three>=1", "absent>=1", "four[x]>=3; extra == 'dev'"]
    here = {"one": "1.9.9", "two": "2.0", "three": "1.0+cu130", "four": "2"}
    monkeypatch.setattr(listing, "requires", lambda name: needs)
    monkeypatch.setattr(listing, "_installation", here.get)
    found = listing.outside_bounds()
    assert [line.split(", but")[0] for line in found] == [
        "outside the bounds: one 1.9.9",
        "outside the bounds: two 2.0",
        "outside the bounds: four 2",
    ]
    assert "pip install 'one>=2.0'" in found[0]
    monkeypatch.setattr(listing, "metadata", lambda name: __import__("email").message_from_string(""))
    code, text = invoke("doctor")
    assert code == 0
    assert "one 1.9.9" in text


@pytest.mark.slow
def test_show_runs_nothing(study_file: Path) -> None:
    code, text = invoke("show", str(study_file))
    assert code == 0
    assert re.findall(r"^final +(\w+) +(\d+)", text, re.M) == [(name, "1") for name in SMALL["methods"]]
    code, text = invoke("show", str(study_file), "--runs")
    assert code == 0
    assert len(re.findall(r"^ *[0-9a-f]{16} .* lr 0.01.* planned", text, re.M)) == 5
    assert not (study_file.parent / "results").exists()


@pytest.mark.slow
def test_run_again_trains_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "results").rglob("*")}
    again = warm.completed("run", "small.yaml", cwd=finished)
    assert again.returncode == 0
    assert "8 done" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (finished / "results").rglob("*")} == before


@pytest.mark.slow
def test_equal_budgets_and_chosen_on_validation(finished: Path) -> None:
    folder = StudyFolder(finished / "results", "small")
    content = folder.read()
    for method in ("lora", "sam"):
        entries = [e for e in content["selection"] if e["method"] == method]
        assert len(entries) == 2
        (best,) = [e for e in entries if e["chosen"]]
        assert best["score"] == max(e["score"] for e in entries)
        final = store.table(folder).query("stage == 'final' and method == @method")
        assert len(final) == 2
        for key, value in best["choice"].items():
            assert set(final[f"hyper.{key}"]) == {value}


@pytest.mark.slow
def test_report(finished: Path) -> None:
    done = warm.completed("report", "small", cwd=finished)
    assert done.returncode == 0, done.stderr
    names = {str(p.relative_to(finished / "reports/small")) for p in (finished / "reports/small").rglob("*")}
    assert {"README.md", "results.md", "results.csv", "results.tex"} <= names
    assert any(name.endswith(".png") for name in names)
    assert any(name.endswith(".pdf") for name in names)


@pytest.mark.slow
def test_measure_again_and_anew(finished: Path) -> None:
    folder = StudyFolder(finished / "results", "small")
    directory = next(d for d in folder.directories() if d.spec()["config"]["stage"] == "final")
    before = directory.measures()
    again = warm.completed("measure", str(directory.path), cwd=finished)
    assert again.returncode == 0, again.stderr
    label = next(name for name in before if name.startswith("sam_sharpness"))
    old, new = before[label]["values"], directory.measures()[label]["values"]
    assert {k: v for k, v in old.items() if k != "seconds"} == {
        k: v for k, v in new.items() if k != "seconds"
    }
    anew = warm.completed(
        "measure", str(directory.path), "--measure", "{name: slice, label: wide, points: 5}", cwd=finished
    )
    assert anew.returncode == 0, anew.stderr
    assert len(directory.measures()["wide"]["values"]["positions"]) == 5


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    content = {
        **SMALL,
        "methods": [{"name": "wild", "optimizer": "plain", "adapter": "none", "train": {"lr": 1e30}}, "lora"],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    done = warm.completed("run", "small.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 diverged, 1 done" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert warm.completed("report", "small", cwd=tmp_path).returncode == 0
    assert "diverged" in (tmp_path / "reports/small/README.md").read_text()


def test_fresh_forgets(study_file: Path) -> None:
    arguments = ("run", str(study_file), "--set", "methods=[lora]", "--set", "train.epochs=1")
    assert invoke(*arguments)[0] == 0
    (run,) = (study_file.parent / "results/small/runs").iterdir()
    done = run / "done.json"
    before = done.stat().st_mtime_ns
    assert invoke(*arguments)[0] == 0
    assert done.stat().st_mtime_ns == before
    assert invoke(*arguments, "--fresh")[0] == 0
    assert done.stat().st_mtime_ns > before


def test_the_best_validation_loss_is_the_smallest(study_file: Path) -> None:
    arguments = ("run", str(study_file), "--set", "methods=[lora]", "--set", "train.epochs=2")
    tune = ("--set", "tune={grid: {lr: [1e-4, 1e-2, 100]}, seeds: [9], metric: loss}")
    code, text = invoke(*arguments, *tune)
    assert code == 0
    scores = {
        e["choice"]["lr"]: e["score"]
        for e in StudyFolder(study_file.parent / "results", "small").read()["selection"]
    }
    assert f"lr {min(scores, key=scores.__getitem__)}" in text.partition("chosen on validation")[2]


def test_another_version_of_a_study_says_what_drops_out(study_file: Path) -> None:
    arguments = ("run", str(study_file), "--set", "methods=[lora]", "--set")
    assert "another version" not in invoke(*arguments, "train.epochs=1")[1]
    assert "1 finished runs are kept there" in invoke(*arguments, "train.epochs=2")[1]


def test_interrupted_from_the_keyboard(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flatbench.orchestration.run_study.run_planned", stop)
    code, text = invoke("run", str(study_file))
    assert code == 130
    assert "run the same command again to go on" in text


BAD: Sequence[tuple[tuple[str, ...], str]] = [
    (
        ("run", "small.yaml", "--set", "train.epohcs=1"),
        "small.yaml: train.epohcs: unknown key; did you mean 'epochs'?",
    ),
    (("run", "small.yaml", "--set", "train.epochs=x"), "train.epochs"),
    (("run", "small.yaml", "--set", "methods=[lroa]"), "unknown method 'lroa'"),
    (("run", "small.yaml", "--set", "name=../up"), "small.yaml: name"),
    (("run", "small.yaml", "--set", "task.train_size=100000"), "train_size"),
    (("run", "small.yaml", "--output", "small.yaml"), "a file is where a folder should be"),
    (("run", "tags.yaml"), "not readable as plain YAML"),
    (("run", "nothing.yaml"), "no such file"),
    (("show", "quikstart"), "did you mean 'quickstart'"),
    (("report", "small"), "no results"),
    (("report", "../small"), "a study's name"),
    (("measure", "nowhere"), "not a run directory"),
    (("run", "small.yaml", "--jobs", "0"), "--jobs"),
    (("run", "small.yaml", "--executor", "lokal"), "unknown executor 'lokal'; did you mean 'local'?"),
    (
        ("run", "small.yaml", "--set", "tune={grid: {lr: [1e-3]}, seeds: [9], metric: nosuch}"),
        "tune.metric: the task has no metric 'nosuch'",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_input(study_file: Path, arguments: tuple[str, ...], expected: str) -> None:
    (study_file.parent / "tags.yaml").write_text("name: !!python/name:os.system\n")
    before = sorted(study_file.parent.rglob("*"))
    code, text = invoke(*arguments)
    assert code == 2, text
    assert expected in text
    assert "Traceback" not in text
    assert sorted(study_file.parent.rglob("*")) == before


def test_a_truncated_checkpoint_cannot_be_measured(study_file: Path) -> None:
    assert invoke("run", str(study_file), "--set", "methods=[lora]", "--set", "train.epochs=1")[0] == 0
    (run,) = (study_file.parent / "results/small/runs").iterdir()
    path = weights.weights_file(RunDirectory(run).adapter)
    path.write_bytes(path.read_bytes()[:100])
    code, text = invoke("measure", str(run), "--measure", "cost")
    assert code == 2
    assert "truncated or not a safetensors file" in text


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a full disk needs root"
)
@pytest.mark.parametrize("size", ["16k", "100k"])
@pytest.mark.slow
def test_a_full_disk(study_file: Path, size: str) -> None:
    """Full at once, or in the middle of a run; with more space the same command goes on to the end."""
    disk = study_file.parent / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this system does not let tests mount a disk")
    try:
        code, text = invoke("run", str(study_file), "--output", str(disk))
        assert code == 2
        assert "no space left" in text
        half = [p for p in disk.rglob("*") if p.is_file() and p.stat().st_size == 0]
        assert not half
        assert not list(disk.rglob("failure.json"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert invoke("run", str(study_file), "--output", str(disk))[0] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_studies_travel_in_the_wheel(tmp_path: Path) -> None:
    """`flatbench list` works from an installed wheel in an empty folder."""
    root = Path(__file__).parent.parent
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("flatbench_lora-*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import flatbench; print(flatbench.__file__); from flatbench.cli import main; main()",
            "list",
        ],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site) in listed.stdout
    assert "quickstart" in listed.stdout
    assert "glue-rte-minilm" in listed.stdout


@pytest.mark.slow
def test_bad_values_never_end_in_a_traceback(study_file: Path) -> None:
    values: list[Any] = [None, 3, "x", [], {}, [None], {"a": 1}, True, -1, "${x}", [[1]], {"name": 3}]
    sections = ("name", "task", "model", "adapter", "methods", "seeds", "train", "tune", "grid", "measures")
    for number, section in enumerate(sections):
        for value in values[number % 3 :: 3]:  # each value in three sections or four; `test_fuzz` tries more
            study_file.write_text(yaml.safe_dump({**SMALL, section: value}))
            code, text = invoke("show", str(study_file))
            assert code in (0, 2), f"{section}: {value}: {text}"
            assert "Traceback" not in text


def test_the_version_is_told_without_a_command() -> None:
    found = CliRunner().invoke(cli.app, ["--version"])
    assert (found.exit_code, found.output) == (0, f"flatbench {flatbench.__version__}\n")
