"""Sentences made from statements: the same numbers, and no claim that the statement does not make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flatbench.report.analysis.differences import ALL
from flatbench.report.analysis.quantities import condition_words, lower_first
from flatbench.report.analysis.relations import LEVELS
from flatbench.report.numbers import fixed, off_zero, significant
from flatbench.report.tables.cells import number
from flatbench.report.text.statement import Statement


def sentence(statement: Statement) -> str:
    """One statement in words, a sentence or two, complete in itself."""
    made = {
        "nothing": _nothing,
        "difference": _difference,
        "highest": _highest,
        "flattest": _flattest,
        "relation": _relation,
        "cost": _cost,
    }[statement.kind](statement)
    named = where(statement.condition)
    # a condition's name is written as it is
    if named and statement.condition != ALL and made.startswith(named):
        return made
    return f"{made[0].upper()}{made[1:]}"


def where(condition: str) -> str:
    """A condition before a sentence."""
    return "" if not condition else f"{condition_words(condition)}: "


def size(statement: Statement, value: float | None, sign: bool = True) -> str:
    """A difference or a ratio as it is shown."""
    if value is None:
        return "unknown"
    if statement.scale == "ratio":
        return f"× {significant(value, 2 if value < 100 else 3)}"
    details = statement.details
    if details.get("column") in ("test", "gap"):
        scale = details["scale"]
        return off_zero(value * scale, 1 if scale == 100 else 3, sign=sign)
    return f"{'+' if sign and value > 0 else ''}{significant(value, 2)}"


def with_interval(statement: Statement) -> str:
    """``+5.2 [+2.7, +7.7]``, or the estimate alone where there is no interval."""
    if statement.low is None or statement.high is None:
        return f"{size(statement, statement.estimate)} (no interval)"
    texts = [_bound(statement, v) for v in (statement.low, statement.high)]
    return f"{size(statement, statement.estimate)} [{', '.join(texts)}]"


def _bound(statement: Statement, value: float) -> str:
    """An end of an interval, with more digits where it would read 1 and the interval excludes 1."""
    text = size(statement, value).removeprefix("× ")
    low, high = statement.low or 0.0, statement.high or 0.0
    if statement.scale == "ratio" and text == "1" and not low <= 1 <= high:
        return next((t for d in range(3, 8) if (t := significant(value, d)) != "1"), text)
    return text


def unseen(statement: Statement) -> str:
    """What a difference must be for this design to show it."""
    smallest = statement.details["smallest"]
    if smallest is None:
        return ""
    unit = f" {statement.details['unit']}" if statement.details["unit"] else ""
    if statement.scale == "ratio":
        text = f"at 80 % power this design shows a factor of {significant(smallest, 2)} or more"
    else:
        text = (
            f"at 80 % power this design shows a difference of {size(statement, smallest, sign=False)}{unit}"
        )
        text += " or more"
    if statement.details["in_points"]:
        seeds = statement.details["seeds_for_a_point"]
        text += f"; for 1 point it takes {seeds if seeds is not None else 'more than 1,000'} seeds"
    return text


def _nothing(statement: Statement) -> str:
    return "No final run has a test metric yet."


def _difference(statement: Statement) -> str:
    details = statement.details
    base = details["reference"]
    over = " over " if statement.scale == "ratio" else " minus "
    unit = f" {details['unit']}" if details["unit"] and statement.scale != "ratio" else ""
    start = (
        f"{where(statement.condition)}{lower_first(_bare(statement))} of {statement.subject}{over}that of "
        f"{base}: "
        f"{with_interval(statement)}{unit}"
    )
    family = f", simultaneous over {details['family']} comparisons" if details["family"] > 1 else ""
    seeds = f"{statement.n} seed{'s' if statement.n != 1 else ''}"
    verdict = details["verdict"]
    if verdict == "no interval":
        return f"{start}; {statement.basis.removeprefix('no interval: ')}, so that nothing is claimed."
    if verdict == "equal":
        return f"{start} ({seeds}): equal in every pair of runs."
    p = f"p {significant(details['p'], 2)}"
    exact = f", exact sign-flip p {significant(details['p_exact'], 2)}" if details["exact"] else ""
    start += f" ({seeds}{family}; {p}{exact})"
    if verdict == "differs" and statement.role == "further":
        one = "1" if statement.scale == "ratio" else "zero"
        return (
            f"{start}: the interval excludes {one}, but this is a secondary comparison, for which no error "
            "rate is kept, and nothing is claimed."
        )
    if verdict == "differs":
        return f"{start}: {statement.subject} is {direction(statement)}."
    if verdict == "undecided":
        return (
            f"{start}: undecided; the interval excludes {'1' if statement.scale == 'ratio' else 'zero'}, "
            f"the exact test does not confirm it, and nothing is claimed; {unseen(statement)}."
        )
    return f"{start}: not distinguishable; {unseen(statement)}."


def _bare(statement: Statement) -> str:
    """The quantity's name without its unit, which stands at the number."""
    name = statement.quantity
    unit = statement.details.get("unit")
    return name.removesuffix(f" ({unit})") if unit else name


def direction(statement: Statement) -> str:
    """The claim of a difference in a word."""
    zero = 1.0 if statement.scale == "ratio" else 0.0
    higher = (statement.estimate or 0.0) > zero
    if statement.details["lower_is_flatter"]:
        return f"{'sharper' if higher else 'flatter'} than {statement.details['reference']}"
    return f"{'above' if higher else 'below'} {statement.details['reference']}"


def _highest(statement: Statement) -> str:
    means = statement.details["means"]
    order = sorted(means, key=lambda m: -means[m])
    scale, percent = statement.details["scale"], statement.details["unit"] == "%"
    texts = [
        f"{m} {fixed(means[m] * scale, 1 if scale == 100 else 3)}{' %' if percent else ''}" for m in order
    ]
    return (
        f"{where(statement.condition)}{lower_first(_without_unit(statement.quantity))}, highest mean first "
        f"({statement.basis}): {', '.join(texts)}."
    )


def _without_unit(header: str) -> str:
    return header.removesuffix(" (%)").removesuffix(" (× 100)")


def _flattest(statement: Statement) -> str:
    means = statement.details["means"]
    if not statement.subject:
        return (
            f"{where(statement.condition)}no method is called the flattest by "
            f"{lower_first(statement.quantity)}."
        )
    order = sorted(means, key=lambda m: means[m])
    return (
        f"{where(statement.condition)}{lower_first(statement.quantity)}, lowest first ({statement.basis}): "
        f"{', '.join(f'{m} {number(means[m])[0]}' for m in order)}."
    )


def tau(level: Mapping[str, Any]) -> str:
    """``+0.31 [+0.11, +0.50]``."""
    if level["estimate"] is None:
        return "undefined"
    text = off_zero(level["estimate"], 2, sign=True)
    if level["low"] is None or level["high"] is None:
        return f"{text} (no interval)"
    return f"{text} [{off_zero(level['low'], 2, sign=True)}, {off_zero(level['high'], 2, sign=True)}]"


def levels_in_words(statement: Statement) -> str:
    """Every level with its τ."""
    found = statement.details["levels"]
    texts = [f"{name} {tau(found[key])}" for key, name in LEVELS.items() if key in found]
    return ", ".join(texts) if len(found) > 1 else ", ".join(tau(level) for level in found.values())


def _relation(statement: Statement) -> str:
    details = statement.details
    name, verdict = statement.quantity, details["verdict"]
    start = f"{lower_first(statement.subject)} and {name}"
    found = details["levels"]
    basis = f"{details['runs']} runs of {details['configurations']} configurations"
    if verdict == "none":
        across = f", Kendall's τ of all runs is {tau(found['kendall'])}" if "kendall" in found else ""
        return (
            f"{start}: no relation is claimed; each method was trained with one configuration, so that only "
            f"differences between methods are seen{across} ({basis})."
        )
    if verdict == "too few":
        return (
            f"{start}: no relation is claimed; {details['configurations']} configurations of "
            f"{details['methods']} methods are too few for an interval. Kendall's τ: "
            f"{levels_in_words(statement)}."
        )
    text = f"{start}, Kendall's τ ({basis}): {levels_in_words(statement)}. {verdict_in_words(statement)}"
    if details["by_condition"]:
        parts = [f"{condition_words(c)} {tau(level)}" for c, level in details["by_condition"].items()]
        text += f" Within methods, by condition: {'; '.join(parts)}."
    return text


def verdict_in_words(statement: Statement) -> str:
    """What the levels together say, as a sentence."""
    details = statement.details
    verdict, found = details["verdict"], details["levels"]
    own = found.get("within_kendall", found.get("kendall"))
    sign = "negative" if own["estimate"] < 0 else "positive"
    if verdict == "sign":
        return f"The levels agree: {statement.claim} here."
    if verdict == "between methods":
        across = tau(found["kendall"])
        return (
            f"The levels contradict each other: across methods {across}, within methods {tau(own)}: what is "
            f"seen across methods comes from differences between methods, and no sign is claimed."
        )
    if verdict == "learning rate":
        missing = [
            f"{LEVELS[key]} {tau(found[key])}" for key in ("granulated_kendall", "equal_lr") if key in found
        ]
        return (
            f"It is {sign} within methods {tau(own)}, but {' and '.join(missing)}: the learning rate, or "
            "another hyper-parameter that moves both, explains it, and no sign is claimed."
        )
    if verdict == "conditions":
        return "The sign depends on the condition, and none is claimed over all of them."
    if own["low"] is not None and (own["low"] > 0 or own["high"] < 0):
        return (
            f"The sign is undetermined: exchanging configurations within methods gives as much by chance "
            f"(permutation p {significant(details['p'], 2)})."
        )
    return "The sign is undetermined."


def _cost(statement: Statement) -> str:
    means = statement.details["means"]
    if statement.details["timed"]:
        texts = [f"{m} {fixed(v, 2)}" for m, v in means.items()]
        return f"{lower_first(statement.quantity)} ({statement.basis}): {', '.join(texts)}."
    groups: dict[str, list[str]] = {}
    for method, value in means.items():
        groups.setdefault(significant(value, 3), []).append(method)
    texts = [f"{count} for {', '.join(names)}" for count, names in groups.items()]
    return (
        f"{lower_first(statement.quantity)}: {'; '.join(texts)}. Times are not compared: none were taken in "
        "turns or on cores of their own."
    )


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names with commas, the rest counted."""
    given: Sequence[str] = list(names)
    rest = len(given) - most
    return ", ".join(given[:most]) + (f" and {rest} more" if rest > 0 else "")
