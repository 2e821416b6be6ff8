"""Scores of answers against the published rules, and the real files whole."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from flatbench.tasks.common.published_files import read_json
from flatbench.tasks.vqa import data as vqa_data
from flatbench.tasks.vqa import metrics as vqa_metrics
from flatbench.tasks.vqa.data import Question
from flatbench.tasks.vqa.metrics import normalised, parsed_choice, vqa_accuracy
from tests.tasks.task_cases import real

# -- ScienceQA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", 0),
        (" C\n", 2),
        ("B. The cat", 1),
        ("The answer is B.", 1),
        ("It is warm. The answer is C. BECAUSE: of the sun", 2),
        ("The answer is A. No: The answer is B.", None),  # two answers are none
        ("D", None),  # of three choices
        ("E. none", None),
        ("Because", None),
        ("A cat", None),
        ("b", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_choices_are_read_as_the_published_script_does(text: str, choice: int | None) -> None:
    assert parsed_choice(text, 3) == choice


def problem(answer: str, subject: str, grade: int, picture: bool, context: bool) -> Question:
    traits = {"subject": subject, "grade": f"grade{grade}", "context": context}
    return Question("1", "?", answer, (answer,), choices=("x", "y"), traits=traits,
                    picture=object() if picture else None)  # type: ignore[arg-type]  # fmt: skip


def test_scienceqa_by_group() -> None:
    questions = [
        problem("A", "natural science", 2, True, True),
        problem("B", "natural science", 6, True, False),
        problem("A", "social science", 7, False, False),
        problem("B", "social science", 12, False, True),
    ]
    found = vqa_metrics.scienceqa(["A", "A", "A", "what"], questions)
    assert found == {
        "accuracy": 0.5,
        "accuracy_natural_science": 0.5,
        "accuracy_social_science": 0.5,
        "accuracy_with_image": 0.5,
        "accuracy_without_image": 0.5,
        "accuracy_with_text_context": 0.5,
        "accuracy_no_context": 1.0,
        "accuracy_grades_1_to_6": 0.5,
        "accuracy_grades_7_to_12": 0.5,
        "no_choice": 0.25,
    }


@pytest.mark.data
def test_scienceqa_parses_whole() -> None:
    found = vqa_data.read("scienceqa", str(real("scienceqa")), None)
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 521, "validation": 500, "test": 1000
    }  # fmt: skip
    every = [q for rows in found.values() for q in rows]
    assert all(q.picture is not None for q in every)
    assert len({q.picture.name for q in every if q.picture}) == 1764
    most = {name: Counter(q.answer for q in rows).most_common(1)[0] for name, rows in found.items()}
    shares = {name: (letter, round(count / len(found[name]), 2)) for name, (letter, count) in most.items()}
    assert shares == {"train": ("B", 0.36), "validation": ("B", 0.43), "test": ("A", 0.37)}
    assert all(max(q.picture.size()) <= 224 for q in every[::50] if q.picture)


@pytest.mark.data
def test_official_problems_parse_whole() -> None:
    """Those without an image are complete here; the images of the others are not."""
    path = real("scienceqa") / "problems.json"
    rows = [
        vqa_data._problem({**row, "pid": pid}, str(path), lambda row, at: None)
        for pid, row in read_json(path).items()
    ]
    assert Counter(split for split, _ in rows) == {"train": 1041, "validation": 371, "test": 361}
    assert {q.traits["subject"] for _, q in rows} == {
        "natural science", "social science", "language science"
    }  # fmt: skip


# -- VizWiz -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("the  dog", "dog"),
        ("An apple, a pear", "apple pear"),
        ("none", "0"),
        ("Ten", "10"),
        ("1,000", "1000"),
        ("3.5.", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("coca-cola", "coca cola"),
        ("what?", "what"),
        ("a/b", "b"),  # the slash becomes a space, and then "a" is an article
        ("red\nblue\tgreen", "red blue green"),
    ],
)
def test_answers_are_normalised_as_published(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def plain_accuracy(answer: str, references: tuple[str, ...]) -> float:
    """min(matches / 3, 1) over every choice of nine of the ten, one by one."""
    subsets = list(combinations(references, len(references) - 1))
    assert len(subsets) == 10
    total = 0.0
    for subset in subsets:
        matches = sum(1 for other in subset if other == answer)
        total += 1.0 if matches >= 3 else matches / 3
    return total / len(subsets)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)  # fmt: skip
def test_vizwiz_accuracy_by_matches(count: int, expected: float) -> None:
    assert vqa_accuracy("Dog!", ["dog"] * count + ["cat"] * (10 - count)) == pytest.approx(expected)


@pytest.mark.data
def test_the_majority_answers_of_the_whole_file() -> None:
    questions = vqa_data.read_annotations(real("vizwiz") / "VizWiz_VQA_v2_val.json.gz")
    assert len(questions) == 3172
    assert all(len(q.references) == 10 for q in questions)
    assert Counter(q.traits["answerable"] for q in questions) == {1: 2251, 0: 921}
    outputs = [q.answer for q in questions]
    expected = [plain_accuracy(normalised(a), q.references) for a, q in zip(outputs, questions, strict=True)]
    certain = [1.0 - q.traits["answerable"] for q in questions]
    found = vqa_metrics.vizwiz(outputs, certain, questions)
    assert found["accuracy"] == pytest.approx(sum(expected) / len(expected), rel=1e-10)
    assert 0.5 < found["accuracy"] < 1
    assert found["answerability_ap"] == found["answerability_f1"] == 1
    # what the published annotations need no normalising for
    assert sum(normalised(a) == a for a in outputs) / len(outputs) > 0.95


def test_answerability() -> None:
    """The unanswerable questions are the positives."""
    questions = [Question(str(i), "?", "x", ("x",) * 10, traits={"answerable": int(i < 2)}) for i in range(4)]
    found = vqa_metrics.vizwiz(["x"] * 4, [0.1, 0.6, 0.7, 0.2], questions)
    assert found["answerability_f1"] == pytest.approx(0.5)  # one of two found, one of two named is wrong
    assert found["answerability_ap"] == pytest.approx((1 + 2 / 3) / 2)
    only = vqa_metrics.vizwiz(["x"] * 2, [0.1, 0.6], questions[:2])
    assert only["answerability_f1"] != only["answerability_f1"]
