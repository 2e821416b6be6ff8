"""Findings of a report: the answer first, then every statement by its question, and all of them as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flatbench.report.analysis.results import Results
from flatbench.report.numbers import rounded
from flatbench.report.text import answer
from flatbench.report.text.sentences import sentence
from flatbench.report.text.statement import Statement
from flatbench.report.text.statements import statements

#: kinds of statements under the question that they answer, in the order of the answer
QUESTIONS: Mapping[str, str] = {
    "generalizes": "Which method generalizes best?",
    "flat": "Which method is flattest?",
    "relation": "Does flatness go with generalization?",
    "cost": "What does it cost?",
}


def findings(results: Results) -> list[str]:
    """The answer in up to five sentences."""
    return answer.answer(results)


def by_question(results: Results) -> dict[str, list[Statement]]:
    """The statements under each of `QUESTIONS` that has any."""
    found: dict[str, list[Statement]] = {name: [] for name in QUESTIONS}
    for statement in statements(results):
        if (name := _question(statement)) is not None:
            found[name].append(statement)
    return {name: own for name, own in found.items() if own}


def _question(statement: Statement) -> str | None:
    if statement.kind == "difference":
        return "generalizes" if statement.details["column"] in ("test", "gap") else "flat"
    kinds = {"highest": "generalizes", "flattest": "flat", "relation": "relation", "cost": "cost"}
    return kinds.get(statement.kind)


def findings_json(results: Results) -> str:
    """``findings.json``: what is said, as data and as text, numbers to 12 significant digits."""
    content = {
        "format": 1,
        "study": results.name,
        "question": answer.question(results),
        "answer": findings(results),
        "reservations": answer.reservations(results),
        "statements": [_round({**asdict(s), "text": sentence(s)}) for s in statements(results)],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, Mapping):
        return {str(k): _round(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_round(v) for v in value]
    return value
