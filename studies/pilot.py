"""Trains a study's tuning runs and stops before the test data: what learns and what is at an edge.

    python studies/pilot.py STUDY results --methods lora eflat_lora
    python studies/pilot.py STUDY local/pilot --methods lora eflat_lora --seeds 9001 9002 9003 --measure

The first is the first half of ``flatbench run STUDY --output results``, for these methods: the same runs in
the same place, so that the second half goes on from them. It ends with exit code 1 if a learning rate that
was chosen is at the edge of its grid, which is widened then, for all methods, before any final run is made.
The second is a pilot with seeds that the study does not use; ``--measure`` takes the study's measures of each
method's best configuration. Neither reads the test split.

Printed are, by condition and configuration, mean and standard deviation of the validation metric and
processor seconds a run; then, for every method's best configuration against the first method's, mean and
standard deviation of the differences paired by seed, of the metric and of the logarithm of the largest
eigenvalue: what the power in studies/PROTOCOL.md is computed from. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flatbench import study
from flatbench.config.hyper_parameters import hyper_text
from flatbench.errors import InputError
from flatbench.report.analysis.summary import edges
from flatbench.runs.finish import finish
from flatbench.runs.measure import take_measures
from flatbench.store import RunDirectory, StudyFolder
from flatbench.store.files import read_json
from flatbench.study.plan import Plan
from flatbench.study.run import Run

#: the primary measure of flatness: label and value
EIGENVALUE = ("hessian_merged", "eigenvalue_1")


@dataclass(frozen=True)
class Trial:
    """A configuration, trained with every seed.

    Attributes:
        hyper: what its grid chose.
        runs: a trained run a seed, in the seeds' order.
        values: the validation metric of each; None where it diverged or the metric is undefined.
        seconds: processor seconds of each that was trained now.
    """

    hyper: Mapping[str, Any]
    runs: Sequence[RunDirectory]
    values: Sequence[float | None]
    seconds: Sequence[float]

    @property
    def score(self) -> float:
        """Mean over the seeds; a trial without one of them cannot win."""
        found = [value for value in self.values if value is not None]
        return fmean(found) if len(found) == len(self.values) else -math.inf


def main() -> None:
    """Train, print, and measure where that is asked for. Raises InputError for the study's own seeds."""
    chosen = _parsed()
    loaded = study.load(chosen.study, chosen.set, roots=chosen.root)
    if chosen.seeds:
        used = {*loaded.file.seeds, *(loaded.file.tune.seeds if loaded.file.tune else ())} & {*chosen.seeds}
        if used:
            raise InputError(f"--seeds: {sorted(used)} are the study's own; choose others")
        own = [*chosen.set, f"tune.seeds={chosen.seeds}"]
        loaded = study.load(chosen.study, own, roots=chosen.root)
    plan = Plan(loaded, StudyFolder(chosen.folder, loaded.name))
    outside = []
    for condition in dict.fromkeys(run.condition for run in plan.tuning):
        print(f"## {condition or loaded.name}")
        best: dict[str, Trial] = {}
        for method in chosen.methods:
            trials = _trials(plan, condition, method)
            best[method] = max(trials, key=lambda trial: trial.score)
            choice = best[method].hyper
            found = edges(choice, [trial.hyper for trial in trials])
            remark = f" (at the edge: {'; '.join(found)})" if found else ""
            print(f"{method}: best {hyper_text(choice)}{remark}", flush=True)
            outside += [method for text in found if text.split()[-1] == "lr"]
        if chosen.measure:
            _measure([run for trial in best.values() for run in trial.runs], loaded.measures)
        _print_differences(best)
    if outside:
        sys.exit(f"learning rates at the edge of their grid: {', '.join(outside)}; widen all grids alike")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study")
    parser.add_argument("folder", type=Path, help="where results go, as flatbench run's --output")
    parser.add_argument("--methods", nargs="+", required=True, help="the first is the reference")
    parser.add_argument("--seeds", nargs="+", type=int, help="other seeds than the study's tuning seeds")
    parser.add_argument("--measure", action="store_true", help="take the study's measures too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as flatbench run's")
    parser.add_argument("--root", action="append", default=[], help="as flatbench run's")
    return parser.parse_args()


def _trials(plan: Plan, condition: str, method: str) -> list[Trial]:
    """A method's configurations, trained. Raises InputError for a method that the study does not tune."""
    runs: dict[str, list[Run]] = {}
    for run in plan.tuning:
        if (run.condition, run.method) == (condition, method):
            runs.setdefault(hyper_text(run.hyper), []).append(run)
    if not runs:
        raise InputError(f"--methods: the study tunes no method '{method}'")
    found = []
    for text, own in runs.items():
        done, seconds = [], []
        for run in own:
            directory = plan.folder.run(run.id)
            directory.prepare(run.spec())
            start = time.process_time()
            if not directory.complete(run.spec()) and directory.state() != "diverged":
                finish(directory.path)
                seconds.append(time.process_time() - start)
            done.append(directory)
        trial = Trial(own[0].hyper, done, [_value(one, own[0].chosen_by) for one in done], seconds)
        found.append(trial)
        values = [value for value in trial.values if value is not None]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        took = f", {fmean(seconds):.1f} s a run" if seconds else ""
        print(f"{method} {text}: {trial.score:.4f}{spread}{took}", flush=True)
    return found


def _value(directory: RunDirectory, metric: str) -> float | None:
    result = directory.result()
    value = result["metrics"]["validation"].get(metric) if result else None
    return None if value is None else float(value)


def _measure(runs: Sequence[RunDirectory], wanted: Mapping[str, Mapping[str, Any]]) -> None:
    for directory in runs:
        missing = {k: m for k, m in wanted.items() if not (directory.path / f"measures/{k}.json").is_file()}
        start = time.process_time()
        take_measures(directory, missing)
        if missing:
            print(f"measures of {directory.path.name}: {time.process_time() - start:.1f} s", flush=True)


def _flatness(directory: RunDirectory) -> float | None:
    label, name = EIGENVALUE
    path = directory.path / f"measures/{label}.json"
    value = read_json(path)["values"][name] if path.is_file() else 0.0
    return math.log(value) if value > 0 else None


def _print_differences(best: Mapping[str, Trial]) -> None:
    first, *others = best
    for method in others:
        told = {
            "metric": (best[method].values, best[first].values),
            "log eigenvalue": tuple([_flatness(run) for run in best[m].runs] for m in (method, first)),
        }
        for name, (values, reference) in told.items():
            pairs = zip(values, reference, strict=True)
            found = [a - b for a, b in pairs if a is not None and b is not None]
            if len(found) > 1:
                mean, spread = fmean(found), stdev(found)
                print(f"{method} - {first}, {name}: {mean:+.4f}, SD {spread:.4f} ({len(found)} seeds)")


if __name__ == "__main__":
    main()
