"""Provenance of the numbers: commands that reproduce them, machines and versions behind them."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence

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


def ranges(seeds: Sequence[int]) -> str:
    """Seeds with neighbours joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7, 8'
    """
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    texts = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return ", ".join(texts)


def citable(results: Results, sentences: Sequence[str]) -> list[str]:
    """Sentences of the answer, each with the study and the version that it is from."""
    source = f"flatbench report {one_line(results.name)}, {_version(results)}"
    return [f"{one_line(text, 5000).removesuffix('.')} ({source})." for text in sentences]


def citation(results: Results) -> str:
    """BibTeX of this report: what was run, by which version, and a number that tells these runs from
    others."""
    identity = hashlib.sha256("\n".join(sorted(map(str, results.final["run"]))).encode()).hexdigest()[:12]
    key = "".join(c if c.isalnum() or c == "-" else "-" for c in one_line(results.name, 60))
    title = "".join(c for c in one_line(results.name) if c not in "{}\\")
    lines = [
        f"@misc{{flatbench-{key},",
        f"  title = {{{{flatbench report {title}}}}},",
        f"  howpublished = {{{_version(results)}}},",
        f"  note = {{{len(results.final)} final runs, seeds {ranges(results.seeds)}; "
        f"sha256 of their sorted ids {identity}}},",
        "}",
    ]
    return "\n".join(lines)


def _version(results: Results) -> str:
    """The package with its version and commit."""
    versions = {str(e["versions"].get("flatbench-lora", "")) for e in results.environments} - {""}
    commits = {str(c)[:12] for e in results.environments if (c := e.get("git_commit"))}
    text = f"flatbench-lora {', '.join(sorted(versions))}".rstrip()
    return text + (f", commit {', '.join(sorted(commits))}" if commits else "")
