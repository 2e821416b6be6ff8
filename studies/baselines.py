"""What no training reaches on a study's test data: the most frequent class, and models at their start.

    python studies/baselines.py STUDY results --output reports/STUDY/baselines.csv

For every condition: the test metrics of always answering the class that is most frequent among the training
labels, and mean and standard deviation, over the study's final seeds, of the model as training finds it
(pretrained weights, fresh adapter). studies/PROTOCOL.md asks for both beside the methods. The study's final
runs must be finished, so that nothing that these numbers tell can enter a choice; nothing is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
import torch

from flatbench import study
from flatbench.errors import InputError
from flatbench.runs import open as opening
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study.plan import Plan
from flatbench.training.trainer import fixed_batches


def main() -> None:
    """Print the table and write it. Raises InputError while a final run of the method is not finished."""
    chosen = _parsed()
    loaded = study.load(chosen.study, chosen.set, roots=chosen.root)
    plan = Plan(loaded, StudyFolder(chosen.folder, loaded.name))
    conditions: dict[str, list[RunDirectory]] = {}
    for run in plan.final(plan.selection()):
        if run.method == chosen.method:
            conditions.setdefault(run.condition, []).append(plan.folder.run(run.id))
    if not conditions:
        raise InputError(f"--method: the study has no method '{chosen.method}' with final runs")
    table = pd.DataFrame(
        row for condition, runs in conditions.items() for row in _rows(condition or loaded.name, runs)
    )
    print(table.to_markdown(index=False, floatfmt=".4f"))
    if chosen.output:
        table.to_csv(chosen.output, index=False, float_format="%.6g")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study")
    parser.add_argument("folder", type=Path, help="where results are, as flatbench run's --output")
    parser.add_argument("--method", default="lora", help="whose final runs say where training starts")
    parser.add_argument("--output", type=Path, help="a CSV file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as flatbench run's")
    parser.add_argument("--root", action="append", default=[], help="as flatbench run's")
    return parser.parse_args()


def _rows(condition: str, runs: Sequence[RunDirectory]) -> list[dict[str, object]]:
    """Rows of a condition: of the most frequent class, where labels are classes, and of untrained models."""
    unfinished = [run.path.name for run in runs if run.result() is None]
    if unfinished:
        raise InputError(
            f"{condition}: {len(unfinished)} final runs are not finished, such as {unfinished[0]}"
        )
    found = [_measured(run) for run in runs]
    rows = []
    for baseline, each in (("most frequent class", 0), ("untrained model", 1)):
        values = [one[each] for one in found if one[each]]
        for name in values[0] if values else ():
            own = [one[name] for one in values]
            rows.append(
                {
                    "condition": condition,
                    "baseline": baseline,
                    "metric": name,
                    "mean": fmean(own),
                    "sd": stdev(own) if len(own) > 1 else None,
                    "seeds": len(own),
                }
            )
    return rows


def _measured(directory: RunDirectory) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Test metrics of the most frequent training class (none for numbers), and of the model at its start."""
    run = opening.open_run(directory, trained=False)
    device, size = opening.place(run.model), run.train.eval_batch_size
    batches = list(fixed_batches(run.task, run.splits.test, size, device))
    untrained = run.task.evaluate(run.model, batches)
    labels = torch.cat([batch["labels"] for batch in batches])
    if labels.is_floating_point():
        return {}, untrained
    training = torch.cat(
        [batch["labels"] for batch in fixed_batches(run.task, run.splits.train, size, device)]
    )
    counts = training.cpu().bincount(minlength=int(labels.max()) + 1)
    always = torch.nn.functional.one_hot(counts.argmax(), len(counts)).float().expand(len(labels), -1)
    return run.task.metrics(always, labels.cpu()), untrained


if __name__ == "__main__":
    main()
