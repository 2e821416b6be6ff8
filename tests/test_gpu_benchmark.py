"""The benchmark of GPUs runs its code on tiny models, and refuses to call a CPU's times a GPU's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench import optim
from tests.tasks.task_cases import write_rte
from tests.tasks.vqa_cases import write_scienceqa

pytestmark = pytest.mark.slow


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FEW = ["lora", "sam", "eflat_lora"]


# that every method trains is what their own tests show; that the benchmark names all of them is seen here
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.long)])
def test_small_runs_every_method_of_both_studies(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    adapted = {"lora", *optim.REGISTRY.names()} - {"plain"}
    assert set(benchmark.methods(adapters_alone=True)) == adapted
    assert set(benchmark.methods(adapters_alone=False)) == {*adapted, "full_ft"}
    if few:
        adapted = set(FEW)
        monkeypatch.setattr(
            benchmark, "methods", lambda adapters_alone: FEW if adapters_alone else [*FEW, "full_ft"]
        )
    data = write_rte(tmp_path / "glue"), write_scienceqa(tmp_path / "scienceqa", counts=(24, 12, 12))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, data), "--small", str(out)])
    benchmark.main()
    found = json.loads((out / "gpu.json").read_text())
    assert found["small"] is True
    for name, known in (
        ("rte_roberta_large", {*adapted, "full_ft"}),
        ("scienceqa_qwen2_5_vl_3b", adapted),
    ):
        assert set(found[name]["methods"]) == known
        for method, cost in found[name]["methods"].items():
            assert cost["state"] == "done", (method, cost)
            assert cost["step_ms"] > 0
            assert cost["peak_memory_mb"] > 0
        assert found[name]["methods"]["lora"]["step_ms_ratio"] == 1
        assert found[name]["methods"]["sam"]["gradients_per_step"] == 2
    assert str(tmp_path) not in json.dumps({key: found[key] for key in found if key != "command"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the full benchmark would begin")
def test_without_a_gpu_it_refuses_in_one_line(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: no CUDA device here; --small FOLDER runs tiny models on the CPU\n"
    )
