"""Joules are differences of counters, over interruptions and their beginning anew, or there is a reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatbench.machine import energy
from flatbench.machine.energy import EnergyMeter
from flatbench.runs import resume
from flatbench.runs.finish import finish
from tests.test_runner import Killed, prepared

CPU = torch.device("cpu")
RANGE = 262_143_328_850


class Machine:
    """A folder such as Linux shows: packages, one of their parts, and psys, which holds all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for zone, name in (("0", "package-0"), ("0:0", "core"), ("1", "package-1"), ("2", "psys")):
            path = folder / f"intel-rapl:{zone}"
            path.mkdir()
            (path / "name").write_text(f"{name}\n")
            (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
            (path / "energy_uj").write_text("1000000\n")

    def use(self, zone: str, joules: float) -> None:
        path = self.folder / f"intel-rapl:{zone}" / "energy_uj"
        path.write_text(f"{int(int(path.read_text()) + joules * 1e6) % RANGE}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    folder = tmp_path / "powercap"
    folder.mkdir()
    monkeypatch.setattr(energy, "POWERCAP", folder)
    return Machine(folder)


def test_packages_alone_are_counted_and_only_between_start_and_stop(machine: Machine) -> None:
    meter = EnergyMeter(CPU)
    machine.use("0", 100)
    meter.start()
    machine.use("0", 3)
    machine.use("1", 4)
    machine.use("0:0", 50)
    machine.use("2", 70)
    assert meter.joules == pytest.approx(7)
    meter.stop()
    machine.use("1", 100)
    assert meter.joules == pytest.approx(7)
    meter.start()
    machine.use("1", 2)
    meter.stop()
    assert meter.joules == pytest.approx(9)
    assert (meter.source, meter.missing) == ("rapl packages, whole machine", None)


def test_a_counter_that_begins_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = EnergyMeter(CPU)
    meter.start()
    for _ in range(5):  # each look sees at most one new beginning
        machine.use("0", 200_000)
        monkeypatch.setattr(energy, "_LOOK_SECONDS", -1)
        meter.look()
    meter.stop()
    assert meter.joules == pytest.approx(1_000_000)


def test_goes_on_adding_after_an_interruption(machine: Machine) -> None:
    first = EnergyMeter(CPU)
    first.start()
    machine.use("0", 5)
    saved = first.state_dict()
    machine.use("0", 1000)  # lost with what was trained since
    second = EnergyMeter(CPU)
    second.load_state_dict(saved)
    second.start()
    machine.use("1", 6)
    second.stop()
    assert second.joules == pytest.approx(11)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "not metered"),
        ({"joules": None, "source": None, "missing": "no counters there"}, "no counters there"),
        ({"joules": 3.0, "source": "nvml, whole GPUs", "missing": None}, "metered otherwise"),
    ],
)
def test_a_part_that_is_not_known_leaves_no_number(machine: Machine, state: Any, reason: str) -> None:
    meter = EnergyMeter(CPU)
    meter.load_state_dict(state)
    meter.start()
    machine.use("0", 5)
    meter.stop()
    assert meter.joules is None
    assert reason in str(meter.missing)
    assert EnergyMeter(CPU).missing is None


def test_no_counters_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    meter = EnergyMeter(CPU)
    meter.start()
    meter.look()
    meter.stop()
    assert meter.joules is None
    assert "no energy counters" in str(meter.missing)


def unreadable(path: Path) -> str:
    if path.name == "energy_uj":
        raise PermissionError(13, "Permission denied", str(path))
    return real_read(path)


real_read: Callable[[Path], str] = Path.read_text


def test_counters_for_the_administrator_only(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", unreadable)
    meter = EnergyMeter(CPU)
    assert meter.joules is None
    assert "for the administrator only" in str(meter.missing)


def test_counters_that_go_away_leave_no_number(machine: Machine) -> None:
    meter = EnergyMeter(CPU)
    meter.start()
    (machine.folder / "intel-rapl:1" / "energy_uj").write_text("")
    meter.stop()
    assert meter.joules is None
    assert meter.missing


# -- GPUs -------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Millijoules by name of a GPU; torch's first is NVML's last."""
    counters = {"GPU-aa": 5_000, "GPU-bb": 9_000}

    def handle(name: str) -> str:
        if name not in counters:
            raise NVMLError("Not Found")
        return name

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda name: counters[name],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    names = ["bb", "aa", "mig"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=names[i]))
    return counters


@pytest.mark.parametrize(("devices", "joules"), [([], 2.0), ([1], 0.5), ([0, 1], 2.5)])
def test_the_runs_own_gpus(gpus: dict[str, int], devices: list[int], joules: float) -> None:
    meter = EnergyMeter(torch.device("cuda", 0), devices)
    meter.start()
    gpus["GPU-bb"] += 2_000
    gpus["GPU-aa"] += 500
    meter.stop()
    assert meter.joules == pytest.approx(joules)
    assert meter.source == "nvml, whole GPUs"


def test_a_gpu_that_nvml_does_not_know(gpus: dict[str, int]) -> None:
    assert EnergyMeter(torch.device("cuda", 2)).missing == "NVML: Not Found"


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "flatbench-lora[energy]" in str(EnergyMeter(torch.device("cuda", 0)).missing)


# -- in runs ----------------------------------------------------------------------------------------------


def test_a_run_records_what_its_training_used_over_interruptions(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step uses one joule, each evaluation a thousand; what was trained twice counts once."""
    step, validate = resume.Trainer._train_step, resume.Trainer._validate
    kill_at = [5]

    def costly_step(trainer: Any, *arguments: Any) -> None:
        machine.use("0", 1)
        step(trainer, *arguments)
        if trainer.step == kill_at[0]:
            raise Killed

    def costly_validation(trainer: Any) -> None:
        machine.use("0", 1000)
        validate(trainer)

    monkeypatch.setattr(resume.Trainer, "_train_step", costly_step)
    monkeypatch.setattr(resume.Trainer, "_validate", costly_validation)
    train = {"epochs": 3, "batch_size": 20, "evaluate_every": 1, "threads": 1}  # three steps an epoch
    directory = prepared(tmp_path, train=train)
    with pytest.raises(Killed):
        finish(directory.path)
    kill_at[0] = 0
    assert finish(directory.path) == "done"
    result = directory.result()
    assert result is not None
    assert result["training"]["energy_joules"] == pytest.approx(9)
    values = directory.measures()["cost"]["values"]
    assert values["energy_joules"] == pytest.approx(9)
    assert values["energy_source"] == "rapl packages, whole machine"
    assert values["jobs"] == 1
