"""Provenance of the numbers: commands that reproduce them, machines and versions behind them."""

from __future__ import annotations

import hashlib
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


def citation(results: Results) -> str:
    """BibTeX of this report: what was run, by which version, and a number that tells these runs from
    others."""
    versions = {str(e["versions"].get("flatbench-lora", "")) for e in results.environments} - {""}
    commits = {str(c)[:12] for e in results.environments if (c := e.get("git_commit"))}
    identity = hashlib.sha256("\n".join(sorted(map(str, results.final["run"]))).encode()).hexdigest()[:12]
    by = f"flatbench {', '.join(sorted(versions))}".rstrip() + (
        f", commit {', '.join(sorted(commits))}" if commits else ""
    )
    key = "".join(c if c.isalnum() or c == "-" else "-" for c in one_line(results.name, 60))
    title = "".join(c for c in one_line(results.name) if c not in "{}\\")
    lines = [
        f"@misc{{flatbench-{key},",
        f"  title = {{{{flatbench report {title}}}}},",
        f"  howpublished = {{{by}}},",
        f"  note = {{{len(results.final)} final runs, seeds {', '.join(map(str, results.seeds))}; "
        f"sha256 of their sorted ids {identity}}},",
        "}",
    ]
    return "\n".join(lines)
