"""Results folders with known numbers, written through the store without any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatbench import store
from flatbench.report.analysis.results import Results
from flatbench.store import StudyFolder

#: what became of a run: numbers by name, or "state" with "error", or None for a run not yet made
Outcome = Mapping[str, Any] | None
Outcomes = Callable[[str, str, int, Mapping[str, Any]], Outcome]

GRID = {"lr": [0.001, 0.01, 0.1]}
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "git_commit": "abc",
    "system": "Linux x86_64",
    "processor": "some processor",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
}


def plain(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that differ by method, condition, seed and learning rate, all by formulas."""
    place = len(method) + 10 * len(condition)
    return {
        "train": 0.9 + 0.001 * seed,
        "validation": 0.7 + 0.01 * place / 10 - abs(math.log10(choice["lr"]) + 2) / 50,
        "test": 0.75 + 0.004 * place / 10 + 0.01 * ((seed * 7 + place) % 5),
        "sharpness": 0.1 / place * (1 + 0.1 * seed),
        "eigenvalue": 100.0 / place * (1 + 0.05 * seed),
        "step_ms": (2.0 if method == "lora" else 4.0) * (1 + 0.1 * seed),
    }


def make(
    root: Path,
    outcomes: Outcomes = plain,
    *,
    name: str = "demo",
    description: str = "A made-up study.",
    methods: Sequence[str] = ("lora", "sam"),
    conditions: Sequence[str] = ("",),
    seeds: Sequence[int] = (0, 1, 2),
    tuned: bool = True,
    metric: str = "accuracy",
    measures: Sequence[str] = ("hessian_merged", "sam_sharpness_merged", "slice_merged", "cost"),
) -> StudyFolder:
    """Write a study's results: tuning over `GRID` with seed 100 and final runs, or all of `GRID` as final."""
    folder = StudyFolder(root, name)
    runs: list[dict[str, Any]] = []
    selection: list[dict[str, Any]] = []

    def run(method: str, condition: str, seed: int, stage: str, choice: Mapping[str, Any]) -> Outcome:
        labels = {"study": name, "condition": condition, "method": method, "metric": metric}
        outcome = outcomes(method, condition, seed, choice)
        made = write_run(folder, labels, seed, stage, choice, outcome, measures)
        place = {"stage": stage, "condition": condition, "method": method, "hyper": dict(choice)}
        runs.append({"id": made, **place})
        return outcome

    choices = [{"lr": lr} for lr in GRID["lr"]]
    for condition in conditions:
        for method in methods:
            finals = choices
            if tuned:
                trials = [_trial(run(method, condition, 100, "tune", c), c, runs) for c in choices]
                scores = [t["score"] for t in trials if t["score"] is not None]
                decided = not any(t["outstanding"] for t in trials) and scores
                best = next((t for t in trials if decided and t["score"] == max(scores)), None)
                labels = {"condition": condition, "method": method}
                selection += [{**labels, **t, "chosen": t is best} for t in trials]
                finals = [best["choice"]] if best else []
            for choice in finals:
                for seed in seeds:
                    run(method, condition, seed, "final", choice)
    folder.write(
        {
            "study": {
                "name": name,
                "description": description,
                "tune": {"grid": GRID, "metric": None, "seeds": [100], "trials": None} if tuned else None,
            },
            "methods": list(methods),
            "conditions": list(conditions),
            "tasks": {c: {"name": "glue", "task": c or "rte", "train_examples": 320} for c in conditions},
            "models": {c: {"name_or_path": "small"} for c in conditions},
            "seeds": list(seeds),
            "budget": {
                m: {"trials": len(choices), "tuning_seeds": [100] if tuned else [], "grid": GRID}
                for m in methods
            },
            "selection": selection,
            "measures": {label: {"name": label, "normalisation": "filter"} for label in measures},
            "runs": runs,
        }
    )
    return folder


_MADE: dict[tuple[Outcomes, str], Results] = {}


def results(root: Path, outcomes: Outcomes = plain, **options: Any) -> Results:
    """The results of `make`, made once for the tests that ask for the same."""
    key = (outcomes, repr(sorted(options.items())))
    if key not in _MADE:
        _MADE[key] = Results.load(make(root, outcomes, **options))
    return _MADE[key]


def _trial(outcome: Outcome, choice: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outcome_state = "outstanding" if outcome is None else outcome.get("state", "done")
    return {
        "choice": dict(choice),
        "score": outcome.get("validation") if outcome else None,
        "runs": [runs[-1]["id"]],
        "outstanding": int(outcome is None),
        "failed": int(outcome_state in ("failed", "diverged")),
    }


def write_run(
    folder: StudyFolder,
    labels: Mapping[str, str],
    seed: int,
    stage: str,
    choice: Mapping[str, Any],
    outcome: Outcome,
    measures: Sequence[str],
) -> str:
    """One run directory; returns its id."""
    optimizer = "plain" if labels["method"] in ("lora", "full_ft") else labels["method"]
    config = {
        "task": {"name": "digits", "condition": labels["condition"]},
        "model": {"name_or_path": "small"},
        "adapter": {"name": "none" if labels["method"] == "full_ft" else "lora"},
        "optimizer": {"name": optimizer, "method": labels["method"]},
        "train": dict(choice),
        "seed": seed,
        "stage": stage,
    }
    directory = folder.run(store.run_id(config, "data"))
    wanted = {label: {"name": label} for label in measures} if stage == "final" else {}
    directory.prepare({**labels, "hyper": dict(choice), "config": config, "data": "data", "measures": wanted})
    if outcome is None:
        return directory.id
    directory.write("environment", ENVIRONMENT)
    if "state" in outcome:
        directory.write("failure", {"traceback": "…", **outcome})
    if "test" not in outcome:
        return directory.id
    splits = ["train", "validation"] + [s for s in outcome if s.startswith("test")] * (stage == "final")
    directory.write(
        "result",
        {
            "metrics": {s: {"loss": _loss(outcome[s]), labels["metric"]: outcome[s]} for s in splits},
            "training": {},
            "weights": "",
        },
    )
    directory.write_history(_history(outcome, labels["metric"]))
    for label in wanted:
        directory.write(f"measures/{label}", {"config": wanted[label], **_measured(label, outcome)})
    if "state" not in outcome:
        directory.write("done", {})
    return directory.id


def _loss(metric: float | None) -> float:
    return 1.0 - (metric or 0.0)


def _history(outcome: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch in (1, 2, 3) if "sharpness" in outcome else ():
        rows.append(
            {
                "step": 2 * epoch,
                "epoch": epoch,
                "sam_sharpness_merged.sharpness": outcome["sharpness"] * (4 - epoch),
                "balancedness.balancedness": -outcome["sharpness"] * epoch,
                "balancedness.layer_1": -outcome["sharpness"] * epoch - 1,
                "balancedness.layer_2": -outcome["sharpness"] * epoch + 1,
                "ema_gap.gap": outcome["sharpness"] / epoch,
                **{f"interference.{k}": v for k, v in _interference(outcome, epoch).items()},
            }
        )
        for step in (1, 2):
            rows.append({"step": 2 * epoch + step, "epoch": epoch, "loss": 2.0 / epoch + 0.1 * step})
        if epoch < 3:
            rows.append({"step": 2 * epoch, "epoch": epoch, f"validation.{metric}": 0.2 * epoch})
    return rows


def _interference(outcome: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """LoRA-SAM's term in both factors is zero in the first epoch: of no direction, and no rise."""
    size = outcome["sharpness"]
    return {
        "loss": 1.0,
        "rho": 0.05,
        **{f"full_{k}": v for k, v in {"share": 1.0, "cosine": 1.0, "rise": 4 * size}.items()},
        **{f"sam_{k}": v for k, v in {"share": size * epoch, "cosine": 0.1 * epoch, "rise": size}.items()},
        "sam_cross_share": size * (epoch - 1),
        "sam_cross_cosine": 0.01 * epoch if epoch > 1 else None,
        "sam_cross_rise": 0.1 * size * epoch if epoch > 1 else None,
    }


def _measured(label: str, outcome: Mapping[str, Any]) -> dict[str, Any]:
    if reason := outcome.get("skip", {}).get(label):
        return {"skipped": reason}
    values: dict[str, Any]
    if label.startswith("hessian"):
        values = {
            "eigenvalue_1": outcome["eigenvalue"],
            "relative_error_bound_1": outcome.get("bound", 0.0005),
            "converged": outcome.get("bound", 0.0005) <= 1e-3,
            "which": outcome.get("which", "LA"),
            **{
                key: outcome[key]
                for key in ("sampling_error_1", "resolved", "matrix", "gauge")
                if key in outcome
            },
            "space": label.removeprefix("hessian_"),
        }
    elif label.startswith("sam_sharpness"):
        values = {
            "sharpness": outcome["sharpness"],
            **{key: outcome[key] for key in ("rounding_error", "below_resolution") if key in outcome},
            "rho": 0.05,
            "space": label.removeprefix("sam_sharpness_"),
        }
    elif label.startswith("slice"):
        positions = [-1.0, -0.5, 0.0, 0.5, 1.0]
        losses = [[0.2 + k * outcome["sharpness"] * t * t for t in positions] for k in (5, 6)]
        values = {"mean_rise": 5.5 * outcome["sharpness"], "positions": positions, "losses": losses}
    elif label.startswith("spectrum"):
        size = outcome["eigenvalue"]
        values = {
            "trace": 3 * size,
            "trace_standard_error": 0.1,
            "space": label.removeprefix("spectrum_"),
            "eigenvalues": [-0.1 * size, 0.0, 0.5 * size, size],
            "density": [0.1, 0.8, 0.01, 0.02],
            "density_lower": [0.05, 0.7, 0.0, 0.01],
            "density_upper": [0.15, 0.9, 0.02, 0.03],
            "width": 0.02 * size,
        }
    elif label == "interference":
        values = _interference(outcome, 3)
    elif label == "balancedness":
        values = {"balancedness": -outcome["sharpness"], "imbalance": 0.5}
    else:
        values = {
            "step_ms": outcome["step_ms"],
            "gradients_per_step": 2 if outcome["step_ms"] > 3 else 1,
            "gflops_per_example": 0.2 if outcome["step_ms"] > 3 else 0.1,
            "peak_memory_mb": 500.0,
            "trainable_parameters": 1234,
            "train_seconds": outcome["step_ms"] / 10,
            **outcome.get("cost", {}),
        }
    return {"values": values}
