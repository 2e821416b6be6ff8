"""The answer of a report in a few sentences, from its statements, and the box of reservations beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flatbench.report.analysis.differences import ALL
from flatbench.report.analysis.quantities import condition_words, lower_first, timed
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import sampling_error_column, summary
from flatbench.report.numbers import significant
from flatbench.report.tables.cells import number
from flatbench.report.text import perturbations, sentences
from flatbench.report.text.sentences import direction, listed, sentence, size, tau, unseen, with_interval
from flatbench.report.text.statement import Statement
from flatbench.report.text.statements import statements
from flatbench.store.content import tied

#: share of a value within which its sampling error leaves it useful, as the measures' own ``interval``
USEFUL = 0.2
#: methods on which measures disagree that are told one by one
_DISAGREEING = 3

#: what every report answers, in the order of `answer`
QUESTION = (
    "Which method generalizes best, which is flattest, does flatness go with generalization, at what cost?"
)


def question(results: Results) -> str:
    """What the study asks: its description, or what every report answers."""
    return " ".join(str(results.content["study"].get("description") or "").split()) or QUESTION


def answer(results: Results) -> list[str]:
    """Up to five sentences, each with the intervals that it rests on."""
    made = statements(results)
    if made[0].kind == "nothing":
        return [sentence(made[0])]
    found = [_generalizes(results, made), _flattest(results, made), _relates(made), _costs(made)]
    return [text for text in [*found, perturbations.said(results)] if text]


def headlines(results: Results) -> list[tuple[str, str]]:
    """The answer for a small screen: a question in a word or two, and what was found.

    One of each sentence of `answer`, in its order.
    """
    made = statements(results)
    if made[0].kind == "nothing":
        return [("", sentence(made[0]))]
    flattest = [s for s in _of(made, "flattest") if s.subject]
    measure = f" by {lower_first(flattest[0].quantity).partition(' (')[0]}" if flattest else ""
    found = [
        ("Generalizes best", _headline(results, _main(made, True), _of(made, "highest"))),
        (f"Flattest{measure}", _headline(results, _main(made, False), flattest)),
        ("Flatness and test metric", _relation(made)),
        ("Cost", _cost_headline(made)),
        ("Perturbations", perturbations.headline(results)),
    ]
    return [(lead, text) for lead, text in found if text]


def _headline(results: Results, main: Sequence[Statement], first: Sequence[Statement]) -> str:
    if not first:
        return ""
    names = list(dict.fromkeys(s.subject for s in first))
    text = names[0] if len(names) == 1 else f"{', '.join(names)} (by condition)"
    text = f"{'lowest' if first[0].kind == 'flattest' else 'highest'} mean {text}"
    claims = sorted((s for s in main if s.claim), key=lambda s: s.details["p"])
    parts = [
        f"{s.subject} {direction(s)}{_under(results, s.condition)}, {with_interval(s)}{_unit(s)}"
        for s in claims
    ]
    if main and all(s.details["verdict"] == "no interval" for s in main):
        parts = [f"no difference to {main[0].details['reference']} has an interval"]
    elif main and not claims:
        parts = [f"none distinguishable from {main[0].details['reference']}"]
    if len(parts) > 2:
        parts = [parts[0], f"{len(parts) - 1} more differ"]
    return "; ".join([text, *parts])


def _relation(made: Sequence[Statement]) -> str:
    main = next((s for s in _of(made, "relation") if s.role == "main"), None)
    if main is None:
        return ""
    if main.claim:
        return main.claim
    return {
        "conditions": "depends on the condition; no sign claimed",
        "between methods": "only between methods; no sign claimed",
        "learning rate": "the learning rate explains it; no sign claimed",
        "undetermined": "sign undetermined",
        "too few": "too few configurations to tell",
    }.get(main.details["verdict"], "cannot be told: one configuration a method")


def _cost_headline(made: Sequence[Statement]) -> str:
    found = _of(made, "cost")
    if not found:
        return ""
    means, timed_ = found[0].details["means"], found[0].details["timed"]
    groups: dict[str, list[str]] = {}
    for method, value in means.items():
        groups.setdefault(significant(value, 3), []).append(method)
    unit = "times LoRA's step" if timed_ else "gradients a step"
    return f"{unit}: {'; '.join(f'{count} {listed(names, 7)}' for count, names in groups.items())}"


def _of(made: Sequence[Statement], kind: str) -> list[Statement]:
    return [s for s in made if s.kind == kind]


def _main(made: Sequence[Statement], test: bool) -> list[Statement]:
    own = [s for s in _of(made, "difference") if s.role == "main"]
    return [s for s in own if (s.details["column"] == "test") == test]


def _generalizes(results: Results, made: Sequence[Statement]) -> str:
    highest, main = _of(made, "highest"), _main(made, True)
    if not highest:
        return ""
    winners = [f"{_winners(s)} ({_level(s)}){_under(results, s.condition)}" for s in highest]
    start = f"Highest mean test {_metric(highest)}: {'; '.join(winners)}."
    return f"{start} {_comparison(results, main, '')}" if main else start


def _winners(statement: Statement) -> str:
    """The method with the highest mean, and those with the same."""
    means = statement.details["means"]
    equal = [m for m in means if means[m] == statement.estimate]
    return " and ".join(filter(None, (", ".join(equal[:-1]), equal[-1])))


def _metric(highest: Sequence[Statement]) -> str:
    names = {s.quantity.removeprefix("Test ").split(" (")[0] for s in highest}
    return names.pop() if len(names) == 1 else "metric"


def _level(statement: Statement) -> str:
    details = statement.details
    percent = " %" if details["unit"] == "%" else ""
    return f"{(statement.estimate or 0) * details['scale']:.{1 if details['scale'] == 100 else 3}f}{percent}"


def _under(results: Results, condition: str) -> str:
    return f" with {condition_words(condition)}" if len(results.conditions) > 1 and condition != ALL else ""


def _comparison(results: Results, main: Sequence[Statement], name: str) -> str:
    """Which methods differ from the reference, and how much the others would have to."""
    base = main[0].details["reference"]
    if all(s.details["verdict"] == "no interval" for s in main):
        why = main[0].basis.removeprefix("no interval: ")
        return f"No difference to {base} has an interval ({why}), so that none is claimed."
    differs = sorted((s for s in main if s.claim), key=lambda s: s.details["p"])
    rest = [s for s in main if not s.claim]
    parts = [
        f"{s.subject} is {direction(s)} ({with_interval(s)}{_unit(s)}{_under(results, s.condition)})"
        for s in differs[:4]
    ]
    if len(differs) > 4:
        parts.append(f"{len(differs) - 4} more differ")
    over = " over all conditions" if main[0].condition == ALL else ""
    texts = [f"{'; '.join(parts)}{over}."] if parts else []
    if rest:
        nearest = min(rest, key=lambda s: (s.details["p"] is None, s.details["p"] or 0.0))
        place = _under(results, nearest.condition)
        near = f"{nearest.subject} comes nearest{place}, {with_interval(nearest)}{_unit(nearest)}"
        what = _count_text(results, rest) if parts else "no method is"
        near = "" if parts else f" ({near})"
        measured = [s for s in rest if s.details["smallest"] is not None]
        power = f"; {_range(measured)}" if measured else ""
        texts.append(f"{what} distinguishable from {base}{'' if parts else over}{near}{power}.")
    return " ".join(
        f"{t[0].upper()}{t[1:]}" if not t.startswith(tuple(results.methods)) else t for t in texts
    )


def _count_text(results: Results, rest: Sequence[Statement]) -> str:
    """``not``-phrases: what else is not distinguishable."""
    if len({s.condition for s in rest}) > 1:
        return f"none of the other {len(rest)} comparisons is"
    return f"{listed([s.subject for s in rest], 7)} {'are' if len(rest) > 1 else 'is'} not"


def _unit(statement: Statement) -> str:
    unit = statement.details["unit"]
    return f" {unit}" if unit and statement.scale != "ratio" else ""


def _range(measured: Sequence[Statement]) -> str:
    """What this design could have seen, over several comparisons."""
    if len(measured) == 1:
        return unseen(measured[0])
    smallest = sorted(measured, key=lambda s: s.details["smallest"])
    low, high = (s.details["smallest"] for s in (smallest[0], smallest[-1]))
    first = measured[0]
    if first.scale == "ratio":
        ends = [significant(v, 2) for v in (low, high)]
        text = "at 80 % power this design shows a factor of "
    else:
        ends = [size(first, v, sign=False) for v in (low, high)]
        text = "at 80 % power this design shows a difference of "
    text += ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
    text += f"{_unit(first)} or more"
    if all(s.details["in_points"] for s in measured):
        counts = [s.details["seeds_for_a_point"] for s in measured]
        numbers = sorted(c for c in counts if c is not None)
        if len(numbers) < len(counts):
            seeds = f"{numbers[0]} to more than 1,000" if numbers else "more than 1,000"
        else:
            seeds = f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
        text += f"; 1 point takes {seeds} seeds"
    return text


def _flattest(results: Results, made: Sequence[Statement]) -> str:
    found, main = _of(made, "flattest"), _main(made, False)
    if not found or not found[0].subject:
        return ""
    one = found[0]
    over = ", over all conditions" if one.condition == ALL else ""
    mean = ("geometric mean " if one.scale == "ratio" else "") + number(one.estimate or 0.0)[0]
    means = one.details["means"]
    order = sorted((m for m in means if m != one.subject), key=lambda m: means[m])
    reference = main[0].details["reference"] if main else None
    # intervals are of differences to the reference: two other methods are not compared with each other
    apart = [m for m in order[:1] if reference not in (None, m, one.subject)]
    then = f"; then {apart[0]}, {number(means[apart[0]])[0]}, not compared with it" if apart else ""
    start = f"Lowest mean {lower_first(one.quantity)}: {one.subject} ({mean}{over}{then})."
    return f"{start} {_comparison(results, main, lower_first(one.quantity))}" if main else start


def _relates(made: Sequence[Statement]) -> str:
    """The relation of the primary measure with the test metric, and with the gap if that says more."""
    own = _of(made, "relation")
    main = next((s for s in own if s.role == "main"), None)
    if main is None:
        return ""
    text = f"Flatness and generalization: {_short(main)}"
    gap = [
        s
        for s in own
        if s.details["column"] == main.details["column"]
        and s.details["target"] == "gap"
        and s.details["verdict"] in ("sign", "between methods", "learning rate", "conditions")
    ]
    return text + (f" With the generalization gap: {_short(gap[0])}" if gap else "")


def _short(statement: Statement) -> str:
    details, found = statement.details, statement.details["levels"]
    verdict = details["verdict"]
    basis = f"{details['configurations']} configurations"
    if verdict == "none":
        across = f" (τ across methods {tau(found['kendall'])})" if "kendall" in found else ""
        return (
            "no relation is claimed, with one configuration a method there is only what differs "
            f"between methods{across}."
        )
    if verdict == "too few":
        return (
            f"no relation is claimed, {basis} are too few for an interval (τ: "
            f"{sentences.levels_in_words(statement)})."
        )
    words = sentences.verdict_in_words(statement)
    short = f"{words[0].lower()}{words[1:]}"
    if verdict in ("between methods", "learning rate"):
        return short
    if verdict == "conditions":
        parts = [f"{tau(level)} with {condition_words(c)}" for c, level in details["by_condition"].items()]
        return f"{short[:-1]}: Kendall's τ within methods is {', '.join(parts)}."
    text = f"{words[0].lower()}{words[1:-1]} (τ: {sentences.levels_in_words(statement)}; {basis})."
    return text


def _costs(made: Sequence[Statement]) -> str:
    found = _of(made, "cost")
    text = sentence(found[0]) if found else ""
    return f"Cost: {text[0].lower()}{text[1:]}" if found else ""


def reservations(results: Results) -> list[str]:
    """What stands against the answer as a whole: seeds, power, selection, shared machine, lost runs."""
    made = statements(results)
    if made[0].kind == "nothing":
        return []
    return [
        *_seeds(results, made),
        *_other_measures(results, made),
        *_sampling(results, made),
        *_selection(results),
        *_lost_seeds(results),
        *_times(results),
    ]


def _seeds(results: Results, made: Sequence[Statement]) -> Iterator[str]:
    both = [*_main(made, True), *_main(made, False)]
    main = [s for s in both if s.details["verdict"] != "no interval"]
    count = len(results.seeds)
    if count == 1:
        yield "One seed: no spread is known, and no difference can be told from chance."
    elif main:
        exact = (
            ""
            if main[0].details["exact"]
            else ", too few for an exact test: intervals assume normal differences"
        )
        family = main[0].details["family"]
        compared = f"{family} comparison{'s' if family > 1 else ''} with {main[0].details['reference']}"
        yield f"{count} seeds{exact}. The intervals above hold together with 95 % ({compared})."


def _other_measures(results: Results, made: Sequence[Statement]) -> Iterator[str]:
    """Measures of flatness that say something else of a method than the primary one."""
    flat = [s for s in _of(made, "difference") if s.details["column"] not in ("test", "gap")]
    found = []
    for one in (s for s in flat if s.role == "main"):
        own = direction(one) if one.claim else ""
        others = [
            s
            for s in flat
            if s.role != "main"
            and (s.subject, s.condition) == (one.subject, one.condition)
            and s.details["verdict"] == "differs"
            and direction(s) != own
        ]
        if not others:
            continue
        first = own or f"not distinguishable from {one.details['reference']}"
        said: dict[str, list[str]] = {}
        for s in others:
            text = f"{lower_first(s.quantity)}, {with_interval(s)}{_unit(s)}"
            said.setdefault(direction(s), []).append(text)
        parts = [f"{words} ({'; '.join(texts)})" for words, texts in said.items()]
        found.append(
            f"Measures of flatness disagree on {one.subject}{_under(results, one.condition)}: {first} by "
            f"{lower_first(one.quantity)}, {' and '.join(parts)}."
        )
    yield from found[:_DISAGREEING]
    if len(found) > _DISAGREEING:
        yield f"They disagree on {len(found) - _DISAGREEING} more comparisons too."


def _sampling(results: Results, made: Sequence[Statement]) -> Iterator[str]:
    """How far the primary measure's values may be from those of all of the training data."""
    primary = next(iter(_of(made, "flattest")), None)
    column = primary.details["column"] if primary is not None else ""
    errors = sampling_error_column(column)
    if primary is None or errors is None or errors not in results.final:
        return
    final = results.final[results.final["test"].notna()]
    share = (final[errors].astype(float) / final[column].astype(float)).abs().dropna()
    wide = int((share > USEFUL).sum())
    if wide:
        yield (
            f"{primary.quantity} of {wide} of {len(share)} runs is uncertain by more than "
            f"{100 * USEFUL:.0f} %, as it was measured on a sample of the training data (median ± "
            f"{significant(100 * float(share.median()), 2)} %). Methods were measured on the same examples, "
            "and intervals of differences are for these: they hold what seeds change."
        )


def _selection(results: Results) -> Iterator[str]:
    data = summary(results)
    if results.tuned:
        edges = data.loc[data["edges"] != "", "method"].nunique()
        seeds = max(len(b["tuning_seeds"]) for b in results.content["budget"].values())
        counted = f"{seeds} tuning seed{'s' if seeds != 1 else ''}"
        text = f"Configurations were chosen on validation data with {counted}"
        if edges:
            text += f"; {edges} of {len(results.methods)} methods at the edge of their grid"
        ties = (e["method"] for e in results.selection if e["chosen"] and tied(e, results.selection) > 1)
        if names := ", ".join(dict.fromkeys(ties)):
            text += f"; several configurations of {names} had the best score: the grid's first was taken"
        yield text + "."
    elif data.duplicated(["condition", "method"]).any():
        yield (
            "Nothing was selected: a method stands for the mean over its whole grid, and another grid would "
            "give another mean."
        )


def _lost_seeds(results: Results) -> Iterator[str]:
    data = summary(results)
    lost = {s: int(data[s].sum()) for s in ("diverged", "failed", "unfinished")}
    if any(lost.values()):
        parts = [f"{count} {state}" for state, count in lost.items() if count]
        yield f"Of {int(data['expected'].sum())} final runs: {', '.join(parts)}; comparisons leave them out."


def _times(results: Results) -> Iterator[str]:
    if results.columns("step_ms") and not timed(results):
        yield (
            "Times are not shown: runs were neither timed in turns with plain LoRA nor known to have had "
            "their cores to themselves, so that times measure the machine too."
        )
