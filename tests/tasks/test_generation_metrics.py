"""Scores of generated texts against the published scripts' numbers and against their definitions."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from decimal import Decimal

import pytest

from flatbench.errors import InputError
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.generation import metrics
from tests.tasks.task_cases import real

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs Java and the generation extra (pycocoevalcap)",
)
needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="needs the generation extra (sacrebleu)"
)


def sample() -> tuple[list[str], list[list[str]]]:
    """E2E's first 60 development meanings with several references: one is the output, the rest stay."""
    pairs = generation_data.read("e2e", str(real("e2e")), None)["validation"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for source, reference in zip(pairs.sources, pairs.references, strict=True):
        groups.setdefault(source, []).append(reference)
    chosen = [group for group in groups.values() if len(group) >= 2][:60]
    return [group[0] for group in chosen], [group[1:] for group in chosen]


# what the challenge's own measure_scores.py (tuetschek/e2e-metrics) prints for that sample
PUBLISHED = {"bleu": 60.74, "nist": 7.6834, "meteor": 0.4542, "rouge_l": 0.6613, "cider": 1.6611}


@pytest.mark.data
@needs_sacrebleu
@pytest.mark.parametrize("name", ["bleu", "nist"])
def test_as_the_published_script_bleu_and_nist(name: str) -> None:
    outputs, references = sample()
    assert metrics.score([name], outputs, references)[name] == pytest.approx(PUBLISHED[name], rel=1e-4)


@pytest.mark.data
@needs_sacrebleu
@needs_java
@pytest.mark.slow
def test_as_the_published_script_all_five() -> None:
    outputs, references = sample()
    assert metrics.score(list(PUBLISHED), outputs, references) == pytest.approx(PUBLISHED, rel=1e-4)


@needs_sacrebleu
def test_bleu_and_nist_are_their_definitions() -> None:
    """One output of five words of which "the cat sat" is in a reference."""
    outputs, references = ["The cat sat on mats"], [["the cat sat there quietly", "a dog"]]
    # 3/5 words, 2/4 pairs, 1/3 triples, no four (smoothed by sacrebleu's exponential rule: 1/2 of 1/2)
    expected = (3 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25
    assert metrics.bleu(outputs, references) == pytest.approx(100 * expected)
    words = Counter(["the", "cat", "sat", "there", "quietly", "a", "dog"])
    information = sum(math.log2(words.total() / words[w]) for w in ("the", "cat", "sat"))
    # every pair and triple is as frequent as its beginning: it tells nothing; the output is longer than 3.5
    assert metrics.nist(outputs, references) == pytest.approx(information / 5)


@needs_sacrebleu
def test_nist_of_short_outputs() -> None:
    """At two thirds of the references' length the factor is one half."""
    whole = metrics.nist(["a b"], [["a b"]])
    longer = metrics.nist(["a b"], [["a b c"]])
    assert whole == pytest.approx(1.0)
    assert longer == pytest.approx(math.log2(3) * 0.5)
    assert metrics.nist([""], [["a"]]) == 0


@needs_sacrebleu
@needs_java
def test_perfect_and_empty_outputs() -> None:
    references = [["the blue spice is cheap", "cheap is the blue spice"], ["a pub near the river"]]
    names = ["bleu", "nist", "rouge_l"]
    perfect = metrics.score(names, [group[0] for group in references], references)
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["rouge_l"] == pytest.approx(1)
    assert metrics.score(names, ["", ""], references) == pytest.approx(dict.fromkeys(names, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48+24 = 72\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("it is #### $5.50 a day", "5.50"),
        ("#### -3", "-3"),
        ("first 3, then 7", "7"),
        ("#### 7 or 9", "7"),
        ("the answer is 12.", "12"),
        ("nothing", None),
        ("5 ####", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert metrics.final_number(text) == (None if number is None else Decimal(number))


def test_exact_match() -> None:
    outputs = ["#### 72", "I say 72.0", "#### 71", "no idea"]
    assert metrics.exact_match(outputs, [["#### 72"]] * 4) == 0.5


@pytest.mark.data
def test_every_published_answer_has_its_number() -> None:
    for pairs in generation_data.read("gsm8k", str(real("gsm8k")), None).values():
        found = [metrics.final_number(text) for text in pairs.references]
        assert all(number is not None for number in found)
        assert metrics.exact_match(pairs.references, [[text] for text in pairs.references]) == 1


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"generation.metrics: bleu needs the package sacrebleu; install it"):
        metrics.check(["exact_match", "bleu"])
    metrics.check(["exact_match"])


def test_missing_java_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"generation.metrics: cider needs Java"):
        metrics.check(["bleu", "cider"])
