"""Per-run numbers, averages and remarks, checked against plain loops over what was stored."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import edges, summary
from flatbench.report.text.remarks import notes
from tests.report.synthetic import make, plain, results


def row(data: Results, method: str, condition: str = "") -> dict[str, Any]:
    frame = summary(data)
    found = frame[(frame["method"] == method) & (frame["condition"] == condition)].to_dict("records")
    assert len(found) == 1
    return {str(key): value for key, value in found[0].items()}


def test_averages_are_the_statistics_modules(tmp_path: Path) -> None:
    data = results(tmp_path, methods=("lora", "sam", "flat_lora"), conditions=("noise=0.0", "noise=0.2"))
    for condition in data.conditions:
        for method in data.methods:
            found = row(data, method, condition)
            runs = [plain(method, condition, seed, {"lr": 0.01}) for seed in (0, 1, 2)]
            assert found["configuration"] == "lr 0.01"
            for name, stored in (
                ("test", "test"),
                ("validation", "validation"),
                ("sam_sharpness_merged.sharpness", "sharpness"),
                ("hessian_merged.eigenvalue_1", "eigenvalue"),
            ):
                values = [run[stored] for run in runs]
                assert found[f"{name}_mean"] == pytest.approx(statistics.fmean(values), rel=1e-11)
                assert found[f"{name}_std"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-15)
                assert found[f"{name}_n"] == 3
            gaps = [run["train"] - run["test"] for run in runs]
            assert found["gap_mean"] == pytest.approx(statistics.fmean(gaps))
            # the synthetic loss is 1 - metric, so the gap of losses is the gap of metrics
            assert found["loss_gap_mean"] == pytest.approx(statistics.fmean(gaps))
            assert (found["tried"], found["tuning_seeds"]) == (3, 1)
            assert found["validation_score"] == plain(method, condition, 100, {"lr": 0.01})["validation"]


def test_times_are_paired_by_seed(tmp_path: Path) -> None:
    """Every sam run takes twice its seed's lora run, though both differ from seed to seed."""
    data = results(tmp_path)
    found = row(data, "sam")
    assert found["time_ratio_mean"] == pytest.approx(2.0)
    assert found["time_ratio_std"] == pytest.approx(0.0, abs=1e-10)
    assert found["step_ms_std"] > 0.1
    assert row(data, "lora")["time_ratio_mean"] == 1.0


def test_a_missing_baseline_run_leaves_its_seed_out(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        if method == "lora" and seed == 1:
            return {"state": "failed", "error": "RuntimeError: no memory"}
        return plain(method, condition, seed, choice)

    found = row(results(tmp_path, outcomes), "sam")
    assert found["time_ratio_n"] == 2
    assert found["test_n"] == 3


def test_the_baseline_is_plain_lora_by_any_name(tmp_path: Path) -> None:
    def renamed(method: str, *rest: Any) -> Any:
        return plain("lora" if method == "lora" else "sam", *rest)

    assert results(tmp_path / "a").baseline == "lora"
    data = results(tmp_path / "b", renamed, methods=("full_ft", "sam"))
    assert data.baseline is None
    assert data.final["time_ratio"].isna().all()


def test_every_final_configuration_of_an_untuned_study(tmp_path: Path) -> None:
    data = results(tmp_path, tuned=False)
    frame = summary(data)
    assert list(frame["configuration"]) == ["lr 0.001", "lr 0.01", "lr 0.1"] * 2
    assert (frame["expected"] == 3).all()
    # lora's own configurations are compared with their geometric mean of the same seed
    assert row_mean(data, "sam") == pytest.approx(2.0)
    # figures show the configuration that is best on validation, never on test
    assert set(data.representatives["configuration"]) == {"lr 0.01"}


def row_mean(data: Results, method: str) -> float:
    frame = summary(data)
    return float(frame.loc[frame["method"] == method, "time_ratio_mean"].mean())


def test_failed_and_diverged_runs_are_counted(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        if method == "sam" and seed == 0:
            return {"state": "diverged", "error": "DivergedError: the loss is nan at step 3"}
        if method == "sam" and seed == 1:  # trained, then a measure failed
            return {**plain(method, condition, seed, choice), "state": "failed", "error": "ValueError: x"}
        if method == "sam" and seed == 2:
            return None
        return plain(method, condition, seed, choice)

    data = results(tmp_path, outcomes)
    found = row(data, "sam")
    counts = {
        key: found[key] for key in ("runs", "expected", "diverged", "failed", "unfinished", "undefined")
    }
    assert counts == {
        "runs": 1,
        "expected": 3,
        "diverged": 1,
        "failed": 1,
        "unfinished": 1,
        "undefined": 0,
    }
    remarks = "\n".join(notes(data))
    assert "sam: 1 of 3 final runs diverged (seed 0: the loss is nan at step 3)." in remarks
    assert "sam: 1 of 3 final runs failed (seed 1: ValueError: x)." in remarks
    assert "sam: 1 of 3 final runs are not finished." in remarks
    assert "lora:" not in remarks


def test_an_undefined_metric_is_not_a_number_and_not_forgotten(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        return {**found, "test": None} if (method, seed) == ("lora", 2) else found

    data = results(tmp_path, outcomes)
    assert row(data, "lora")["undefined"] == 1
    assert row(data, "lora")["test_n"] == 2
    assert "lora: the test metric of 1 of 3 runs is undefined." in notes(data)


def test_tuning_that_is_not_done(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return None if method == "sam" and choice["lr"] == 0.1 else plain(method, condition, seed, choice)

    data = results(tmp_path, outcomes)
    found = row(data, "sam")
    assert (found["runs"], found["unfinished"], found["configuration"]) == (0, 3, "")
    assert any(note.startswith("sam: not chosen yet, 1 tuning runs are outstanding") for note in notes(data))


def test_tuning_that_failed_everywhere(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        lost = {"state": "diverged", "error": "DivergedError: nan"}
        return lost if method == "sam" else plain(method, condition, seed, choice)

    remarks = notes(results(tmp_path, outcomes))
    assert "sam: no hyper-parameters could be chosen, every configuration failed on some seed." in remarks
    assert "sam: 3 of 3 tuning runs diverged; their configurations could not be chosen." in remarks


def test_only_tuning_so_far(tmp_path: Path) -> None:
    data = results(tmp_path, lambda *_: None)
    assert data.final.empty
    assert list(summary(data)["runs"]) == [0, 0]
    assert len(notes(data)) == 2


def test_skipped_absent_and_unconverged_measures(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = {**plain(method, condition, seed, choice), "bound": 0.02 if seed == 0 else 0.0001}
        if method == "sam":
            found["skip"] = {"hessian_adapter": "the model has no adapter"}
        return found

    folder = make(tmp_path, outcomes, measures=("hessian_adapter", "cost"))
    content = folder.read()
    content["measures"]["trace"] = {"name": "trace"}
    folder.write(content)
    remarks = notes(Results.load(folder))
    assert "hessian_adapter was skipped for sam (3 runs): the model has no adapter." in remarks
    assert "trace is a measure of the study but was not taken on 6 of 6 runs." in remarks
    assert (
        "hessian_adapter: 1 of 3 runs did not reach the tolerance; the largest relative error bound is 0.02."
        in remarks
    )


def test_one_seed_says_so(tmp_path: Path) -> None:
    assert any(note.startswith("One seed") for note in notes(results(tmp_path / "a", seeds=(0,))))
    assert not any(note.startswith("One seed") for note in notes(results(tmp_path / "b")))


@pytest.mark.parametrize(
    ("choice", "tried", "expected"),
    [
        ({"lr": 0.1}, [{"lr": 0.1}, {"lr": 0.01}], ["largest lr"]),
        ({"lr": 0.1}, [{"lr": 0.1}, {"lr": 0.01}, {"lr": 1}], []),
        ({"lr": 0.1, "rho": 1}, [{"lr": 0.1, "rho": 1}, {"lr": 1.0, "rho": 1}], ["smallest lr"]),
        ({"schedule": "a"}, [{"schedule": "a"}, {"schedule": "b"}], []),
        ({"dora": True}, [{"dora": True}, {"dora": False}], []),
    ],
)
def test_edges_of_a_grid(choice: Any, tried: Any, expected: list[str]) -> None:
    assert edges(choice, tried) == expected
