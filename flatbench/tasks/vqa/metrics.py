"""Scores of generated answers as ScienceQA's and VizWiz's published scripts compute them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from sklearn.metrics import average_precision_score, f1_score

from flatbench.tasks.vqa.data import LETTERS, Question

# -- ScienceQA --------------------------------------------------------------------------------------------

#: the letters that the scripts know
_OPTIONS = LETTERS[:5]
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parsed_choice(text: str, choices: int) -> int | None:
    """The number of the choice that a generated text names, or None.

    LLaVA's rule (``eval_science_qa.py``): the text is a letter; or begins with a letter, a full stop and a
    space; or says "The answer is X." exactly once. A letter beyond the choices names none. What names no
    choice is counted wrong, as there; ScienceQA's first script drew a choice at random instead, which gives a
    model that cannot answer chance accuracy and makes the figure random.

    >>> parsed_choice(" B ", 3), parsed_choice("C. because", 3), parsed_choice("The answer is A.", 3)
    (1, 2, 0)
    >>> parsed_choice("Because it is cold", 3), parsed_choice("D", 3)
    (None, None)
    """
    text = text.strip()
    if len(text) == 1 and text in _OPTIONS:
        letter = text
    elif text[:1] in _OPTIONS and text[1:3] == ". ":
        letter = text[0]
    else:
        said = _SENTENCE.findall(text)
        if len(said) != 1:
            return None
        letter = said[0]
    number = LETTERS.index(letter)
    return number if number < choices else None


def _grades(first: int, last: int) -> Callable[[Question], bool]:
    names = {f"grade{i}" for i in range(first, last + 1)}
    return lambda q: q.traits.get("grade") in names


#: the groups of ScienceQA's table, by the figure's name
GROUPS: dict[str, Callable[[Question], bool]] = {
    "accuracy_natural_science": lambda q: q.traits.get("subject") == "natural science",
    "accuracy_social_science": lambda q: q.traits.get("subject") == "social science",
    "accuracy_language_science": lambda q: q.traits.get("subject") == "language science",
    "accuracy_with_image": lambda q: q.picture is not None,
    "accuracy_without_image": lambda q: q.picture is None,
    "accuracy_with_text_context": lambda q: bool(q.traits.get("context")),
    "accuracy_no_context": lambda q: q.picture is None and not q.traits.get("context"),
    "accuracy_grades_1_to_6": _grades(1, 6),
    "accuracy_grades_7_to_12": _grades(7, 12),
}


def scienceqa(outputs: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """``accuracy`` of all questions and of each group of the published table that has any; ``no_choice``.

    ``no_choice`` is the share of outputs that name no choice, which are counted wrong.
    """
    chosen = [parsed_choice(text, len(q.choices)) for text, q in zip(outputs, questions, strict=True)]
    right = [c is not None and LETTERS[c] == q.answer for c, q in zip(chosen, questions, strict=True)]
    found = {"accuracy": fmean(right)}
    for name, belongs in GROUPS.items():
        group = [r for r, q in zip(right, questions, strict=True) if belongs(q)]
        if group:
            found[name] = fmean(group)
    return {**found, "no_choice": fmean(c is None for c in chosen)}


# -- VizWiz -----------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_FROM_THE_CHALLENGE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've 'twas we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
    y'all you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've
    shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'll y'all'd've you'd've
"""
#: a word that lacks one of its apostrophes -> the word; the last is the challenge's own slip
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _FROM_THE_CHALLENGE.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalised(answer: str) -> str:
    """An answer as the VQA challenge's script, and VizWiz's after it, compare it.

    Punctuation goes (or becomes a space, between letters), full stops before no digit go, articles go,
    numbers up to ten become digits, contractions get their apostrophes, everything is lower case.

    >>> normalised("The Coca-Cola can."), normalised("Two  dogs"), normalised("4.5")
    ('coca cola can', '2 dogs', '4.5')
    >>> normalised("I dont know")
    "i don't know"
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    cleaned, numeric = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if alone or numeric else " ")
    cleaned = _FULL_STOP.sub("", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(output: str, references: Sequence[str]) -> float:
    """``min(matches / 3, 1)`` averaged over the sets of references that leave one out.

    As in VizWiz's script the output is normalised and the published references, which are already, are not.

    >>> vqa_accuracy("Coke.", ["coke"] * 3 + ["pepsi"] * 7)  # 7 sets with 3 matches, 3 sets with 2
    0.9
    """
    matches = [reference == normalised(output) for reference in references]
    return fmean(min((sum(matches) - own) / 3, 1) for own in matches)


def vizwiz(
    outputs: Sequence[str], unanswerable: Sequence[float], questions: Sequence[Question]
) -> dict[str, float]:
    """VizWiz's ``accuracy``, and how well unanswerable questions are told.

    ``answerability_ap`` and ``answerability_f1`` are, as in its script, average precision and F1 (at 0.5)
    with the unanswerable questions as positives; NaN where the questions do not say, or are all of one kind.

    Args:
        unanswerable: the model's probability that a question cannot be answered, a number a question.
    """
    scores = [vqa_accuracy(text, q.references) for text, q in zip(outputs, questions, strict=True)]
    truth: list[Any] = [q.traits.get("answerable") for q in questions]
    precision = f1 = math.nan
    if set(truth) == {0, 1}:
        positive = [1 - answerable for answerable in truth]
        precision = float(average_precision_score(positive, list(unanswerable)))
        f1 = float(f1_score(positive, [p > 0.5 for p in unanswerable]))
    return {"accuracy": fmean(scores), "answerability_ap": precision, "answerability_f1": f1}
