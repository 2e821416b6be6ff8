"""Provenance of the numbers: commands that reproduce them, machines and versions behind them."""

from __future__ import annotations

import shlex

from flatbench.report.analysis.results import Results
from flatbench.report.tables.cells import one_line

STUDY_FILE = "`study.yaml` in this folder is the study with every override put in:"


def commands(results: Results) -> list[str]:
    """Shell commands that train, measure and report the study again."""
    return ["flatbench run study.yaml", f"flatbench report {shlex.quote(one_line(results.name))}"]


def machines(results: Results) -> list[str]:
    """A sentence for every machine and set of versions that runs were trained on."""
    sentences = []
    for environment in results.environments:
        versions = ", ".join(f"{key} {value}" for key, value in environment["versions"].items())
        commit = environment.get("git_commit")
        threads = environment["threads"]
        sentences.append(
            f"{len(environment['runs'])} runs on {environment['device']}, {environment['processor']}, "
            f"{environment['cores']} cores, {threads} thread{'s' if threads != 1 else ''} a run, "
            f"{environment['system']}; {versions}" + (f"; commit {commit}" if commit else "") + "."
        )
    return sentences
