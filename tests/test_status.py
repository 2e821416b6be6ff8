"""What `flatbench status` shows, from run directories alone, and what a stopped study leaves."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from rich.console import Console

from flatbench.cli import status
from flatbench.errors import InputError
from flatbench.executors.local import Local, gpus
from flatbench.orchestration import site as sites
from flatbench.runs.finish import finish
from flatbench.store import StudyFolder, claims, events
from tests.executors import fake_slurm, studies
from tests.holds import Hold, gone
from tests.test_cli import invoke
from tests.test_runner import prepared

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[1]


def study_of(folder: Path) -> StudyFolder:
    study = StudyFolder(folder, "small")
    places = [
        {"id": path.name, "stage": "final", "condition": "", "method": path.name[:4], "hyper": {"lr": 0.01}}
        for path in sorted((study.path / "runs").iterdir())
    ]
    study.write({"runs": places})
    return study


def test_every_state_is_told(tmp_path: Path) -> None:
    made = [prepared(tmp_path, seeds=[seed]) for seed in range(4)]
    done, diverged, running, waiting = made
    finish(done.path)
    diverged.write("failure", {"state": "diverged", "error": "the loss is nan", "traceback": ""})
    events.record(running.path, "worker died", how="killed by SIGKILL")
    study = study_of(tmp_path)
    with claims.claimed(running.path):
        running.write("progress", {"fraction": 0.25})
        found = {run.id: run for run in status.survey(study)}
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(status.tables(list(found.values())))
    assert {d.id: found[d.id].state for d in made} == {
        done.id: "done",
        diverged.id: "diverged",
        running.id: "running",
        waiting.id: "planned",
    }
    assert found[running.id].fraction == 0.25
    assert found[running.id].deaths == 1
    assert found[running.id].host
    assert found[diverged.id].error == "the loss is nan"
    assert json.loads(found[done.id].line())["fraction"] == 1.0
    text = console.export_text()
    assert "4 runs: 1 planned, 1 running, 1 done, 1 diverged" in text
    assert "the loss is nan" in text
    assert {run.id: run.state for run in status.survey(study)}[running.id] == "planned"


def test_80_columns_hold_every_name_and_the_answer_comes_first() -> None:
    names = ["a_method_with_a_long_name", "flat_lora_rwp", "lora"]
    runs = [
        status.RunStatus(f"{i}", stage, f"task.label_noise={noise}", name, i, {"lr": 0.1}, state, 1.0)
        for stage in ("tune", "final")
        for name in names
        for noise in (0.0, 0.2)
        for i, state in enumerate(("done", "failed", "planned", "running", "interrupted", "diverged"))
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status.tables(runs))
    text = console.export_text()
    assert text.startswith("72 runs: 12 planned, 12 running, 12 interrupted, 12 done, 12 diverged, 12 failed")
    assert max(map(len, text.splitlines())) <= 80
    table = text.split("\n\n")[1]
    for name in names:
        assert len(re.findall(rf"\b{name}\b", table)) == 4
    assert "condition" in table
    assert "20 % wrong labels" in " ".join(text.split())


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_saves_and_the_same_study_goes_on(tmp_path: Path, jobs: int) -> None:
    hold, folder = Hold(tmp_path / "holds"), studies.written(tmp_path / "study", studies.PAIR)
    hold.close("epoch")
    process = studies.start(folder, "--jobs", str(jobs), hold=hold)
    hold.wait(jobs, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert gone(children)
    runs = studies.runs(folder)
    assert not [left for run in runs for left in run.path.glob("claim-*")]
    assert studies.happened(*runs).count("stopped") == jobs
    code, shown = shown_status(folder)
    assert code == 0
    states = [json.loads(line)["state"] for line in shown.splitlines()]
    assert states.count("interrupted") == jobs
    assert "running" not in states
    hold.open()
    # `test_chaos` starts one with several jobs again
    assert studies.start(folder, hold=hold).wait() == 0
    assert studies.happened(*runs).count("trained") == 2
    studies.assert_no_step_twice(*runs)


def shown_status(folder: Path) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return invoke("status", "small.yaml", "--json")


SITES = {
    "executor: {name: local, jobs: 2}\nretries: 0": None,
    "retires: 1": "retires: unknown key; did you mean 'retries'?",
    "executor: {name: local, job: 2}": "executor.job: unknown key",
    "executor: slrum": "unknown executor 'slrum'",
    "lease: 0": "lease",
}


@pytest.mark.parametrize(("text", "message"), SITES.items())
def test_a_site_file(tmp_path: Path, text: str, message: str | None) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    if message is not None:
        with pytest.raises(InputError) as error:
            sites.executor(sites.read(file), str(file))
        assert message in str(error.value)
        assert "site.yaml" in str(error.value)
        return
    site = sites.read(file)
    chosen = sites.executor(site, str(file))
    assert isinstance(chosen, Local)
    assert chosen.jobs == 2
    assert sites.drive(site, chosen).retries == 0


def test_every_documented_site_file_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    made = set()
    for number, block in enumerate(text.split("```yaml\n")[1:]):
        file = tmp_path / f"site-{number}.yaml"
        file.write_text(block.partition("```")[0])
        site = sites.read(file)
        given = yaml.safe_load(file.read_text())
        assert site == sites.read(None).model_copy(
            update={k: given[k] for k in ("executor", "trackers") if k in given}
        )
        made.add(type(sites.executor(site, "site")).__name__)
    assert {"Local", "Slurm", "Ray"} <= made


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus() == ["3", "5"]
    four = Local(jobs=4)
    assert [four._devices(worker) for worker in range(4)] == ["3", "5", "3", "5"]
    assert Local(jobs=1, gpus_per_run=2)._devices(0) == "3,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert four._devices(0) is None
