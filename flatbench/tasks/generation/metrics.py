"""Scores of generated texts: E2E's five by the libraries that hold them, and GSM8K's final number."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from statistics import fmean
from typing import Any

from flatbench.errors import InputError, shown

Texts = Sequence[str]
References = Sequence[Sequence[str]]

_INSTALL = "install it: pip install 'flatbench-lora[generation]'"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def check(names: Sequence[str]) -> None:
    """Raise InputError if something that the metrics need is not installed."""
    for name in names:
        for package in _PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise InputError(f"generation.metrics: {name} needs the package {package}; {_INSTALL}")
        if name in _JAVA and shutil.which("java") is None:
            raise InputError(
                f"generation.metrics: {name} needs Java, as its published script does; install a Java "
                "runtime, or leave this metric out"
            )


def check_references(names: Sequence[str], references: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError if exact_match is to be taken and a reference has no number: no output would equal it.

    Args:
        references: split -> its references.
    """
    for split, texts in references.items():
        without = [text for text in texts if final_number(text) is None]
        if without and "exact_match" in names and split != "train":
            raise InputError(
                f"generation.metrics: exact_match compares final numbers, and {len(without)} of {len(texts)} "
                f"references of {split} have none, the first is '{shown(without[0])}'; leave those rows out, "
                "or choose another metric"
            )


def score(names: Sequence[str], outputs: Texts, references: References) -> dict[str, float]:
    """The metrics called ``names``, each over the whole corpus.

    Args:
        outputs: one text a source.
        references: one or more texts a source.
    """
    found: dict[str, float] = {}
    if _JAVA & set(names):
        outputs_ptb, references_ptb = _ptb(outputs, references)
    for name in names:
        if name in _JAVA:
            found[name] = _METRICS[name](outputs_ptb, references_ptb)
        else:
            found[name] = _METRICS[name](outputs, references)
    return found


def bleu(outputs: Texts, references: References) -> float:
    """Corpus BLEU (0-100) with mteval-v13a's tokens, ignoring case, as E2E's script does, by sacrebleu."""
    from sacrebleu.metrics import BLEU

    return float(BLEU(tokenize="13a", lowercase=True).corpus_score(list(outputs), _streams(references)).score)


def nist(outputs: Texts, references: References, longest: int = 5) -> float:
    """NIST (Doddington 2002) as mteval-v13a computes it, with its tokens, ignoring case.

    ``Σ_n (Σ_matched info(w_1…w_n) / Σ_output 1) · exp(β·ln²(min(1, L_output/L_reference)))``, where
    ``info = log2(count(w_1…w_{n-1}) / count(w_1…w_n))`` over all references, an n-gram matches at most as
    often as in the reference that has it most often, ``L_reference`` is the mean length of a source's
    references, and β makes the factor 0.5 at a ratio of 2/3. Not by nltk, whose NIST credits only the
    closest reference and is lower with several.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokens = Tokenizer13a()
    hypotheses = [_ngrams(tokens(text.lower()).split(), longest) for text in outputs]
    groups = [[_ngrams(tokens(text.lower()).split(), longest) for text in group] for group in references]
    counts: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        for reference in group:
            counts.update(reference)
    counts[()] = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    gained, made = [0.0] * (longest + 1), [0] * (longest + 1)
    for hypothesis, group in zip(hypotheses, groups, strict=True):
        for ngram, count in hypothesis.items():
            made[len(ngram)] += count
            matched = min(count, max(reference[ngram] for reference in group))
            if matched:
                gained[len(ngram)] += matched * math.log2(counts[ngram[:-1]] / counts[ngram])
    score = sum(g / m for g, m in zip(gained, made, strict=True) if m)
    expected = sum(fmean(_length(reference) for reference in group) for group in groups)
    ratio = min(1.0, sum(map(_length, hypotheses)) / expected) if expected else 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(beta * math.log(ratio) ** 2) if ratio else 0.0


def _ngrams(tokens: Sequence[str], longest: int) -> Counter[tuple[str, ...]]:
    spans = ((i, i + n) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))
    return Counter(tuple(tokens[start:end]) for start, end in spans)


def _length(ngrams: Counter[tuple[str, ...]]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 1)


def meteor(outputs: dict[int, list[str]], references: dict[int, list[str]]) -> float:
    """METEOR 1.5 (0-1), the published Java program, by pycocoevalcap."""
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(references, outputs)[0])


def rouge_l(outputs: dict[int, list[str]], references: dict[int, list[str]]) -> float:
    """ROUGE-L (0-1, F with beta 1.2, the best reference), as COCO's script computes it, by pycocoevalcap."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(references, outputs)[0])


def cider(outputs: dict[int, list[str]], references: dict[int, list[str]]) -> float:
    """CIDEr (document frequencies from the references), as COCO's script computes it, by pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(references, outputs)[0])


def exact_match(outputs: Texts, references: References) -> float:
    """Share of outputs whose final number equals that of their reference."""
    right = 0
    for output, group in zip(outputs, references, strict=True):
        number = final_number(output)
        right += number is not None and any(number == final_number(reference) for reference in group)
    return right / len(outputs)


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", or else the last one in the text; None if there is none.

    >>> final_number("so 3 + 4 = 7. #### 1,007.0")
    Decimal('1007.0')
    >>> final_number("She has $12.")
    Decimal('12')
    """
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _streams(references: References) -> list[list[str | None]]:
    """References the other way round, as sacrebleu takes them: None where a source has fewer."""
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


def _ptb(outputs: Texts, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Both through Stanford's tokenizer, which COCO's scripts and E2E's run first."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(groups: References) -> dict[int, list[str]]:
        # an empty last line would be lost; a full stop is a token that the tokenizer leaves out
        captions = {i: [{"caption": text.strip() or "."} for text in group] for i, group in enumerate(groups)}
        found: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
        return found

    return tokens([[text] for text in outputs]), tokens(references)


_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "bleu": bleu,
    "nist": nist,
    "meteor": meteor,
    "rouge_l": rouge_l,
    "cider": cider,
    "exact_match": exact_match,
}
_PACKAGES: dict[str, tuple[str, ...]] = {
    "bleu": ("sacrebleu",),
    "nist": ("sacrebleu",),
    "meteor": ("pycocoevalcap",),
    "rouge_l": ("pycocoevalcap",),
    "cider": ("pycocoevalcap",),
    "exact_match": (),
}
_JAVA = {"meteor", "rouge_l", "cider"}
