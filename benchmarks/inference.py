"""How often a report's inference misleads: simulated studies whose truth is known.

Three uses, each by the functions that reports call:

- differences to a reference (`flatbench.report.analysis.inference.judge`): studies in which no method
  differs, with methods that are equally stable, an unstable reference, one unstable method, spreads from
  0.3 to 3, and noise that is normal, heavy-tailed, skewed or in two lumps. ``false_claims`` is the share of
  studies with at least one claimed difference over both questions (test metric and flatness),
  ``false_claims_test`` over the test metric alone; ``coverage`` is that of all intervals of a study at
  once, methods differing at random.
- the relation of flatness and generalization (`flatbench.report.analysis.relations.relation`): studies
  without any, of 3 to 12 methods with 3 to 30 configurations and three seeds, the methods' effects on both
  having a standard deviation of 0 to 2 of the configurations'. ``false_signs`` is the share of studies that
  claim a sign; ``coverage`` that of each level's interval; ``pooled_false_signs`` what the correlation over
  all runs with intervals by configuration alone, as reports had it before, would have claimed. In
  ``slopes`` each method has a relation of its own, on average none; in ``conditions`` the same
  configurations come back three times.
- what is there to be found: the share of studies that claim the sign of a true relation, that say "between
  methods" where the relation is reversed within methods (Simpson's paradox), and that show a true
  difference of the size that the report calls visible at 80 % power.

Goal: false claims at most 6 % at a nominal 5 %.

    python benchmarks/inference.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.correlation import Kendall
from flatbench.report.analysis.inference import judge
from flatbench.report.analysis.relations import Relation, relation
from flatbench.report.analysis.statistics import clustered_jackknife

HYPER = ["hyper.lr", "hyper.rho"]

#: noise of variance one
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Any]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed (t with 4 degrees)": lambda rng, shape: rng.standard_t(4, shape) / math.sqrt(2),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
    "two lumps (a third of runs fails)": lambda rng, shape: (
        ((rng.random(shape) < 1 / 3) - 1 / 3) / math.sqrt(2 / 9) + 0.05 * rng.standard_normal(shape)
    ),
}
#: standard deviation of each method's noise, the reference first
SPREADS: dict[str, Callable[[int], Any]] = {
    "equally stable": lambda count: np.ones(count),
    "unstable reference": lambda count: np.r_[5.0, np.ones(count - 1)],
    "one unstable method": lambda count: np.r_[np.ones(count - 1), 5.0],
    "from 0.3 to 3": lambda count: np.geomspace(0.3, 3, count),
}


def differences(
    rng: np.random.Generator, methods: int, seeds: int, spreads: Any, noise: Any, effects: Any = 0.0
) -> list[Any]:
    """A study's paired differences to its first method: what a seed does to all methods cancels."""
    values = spreads[:, None] * noise(rng, (methods, seeds)) + np.reshape(effects, (-1, 1))
    return list(values[1:] - values[0])


def compare(studies: int, methods: int, seeds: int, spread: str, noise: str) -> dict[str, Any]:
    """False claims without differences, and coverage with random ones."""
    rng = np.random.default_rng([methods, seeds])
    spreads, family = SPREADS[spread](methods), 2 * (methods - 1)
    wrong, wrong_test, covered = 0, 0, 0
    for _ in range(studies):
        test, flatness = (
            judge(differences(rng, methods, seeds, spreads, NOISE[noise]), family) for _ in range(2)
        )
        wrong_test += any(found.differs for found in test)
        wrong += any(found.differs for found in [*test, *flatness])
        effects = rng.standard_normal(methods)
        truth = effects[1:] - effects[0]
        found = judge(differences(rng, methods, seeds, spreads, NOISE[noise], effects), family)
        covered += all(not f.interval.excludes(t) for f, t in zip(found, truth, strict=True))
    return {
        "methods": methods,
        "seeds": seeds,
        "spreads": spread,
        "noise": noise,
        "studies": studies,
        "false_claims": wrong / studies,
        "false_claims_test": wrong_test / studies,
        "coverage": covered / studies,
    }


def seen(studies: int, methods: int, seeds: int) -> dict[str, Any]:
    """How often the difference is shown that a design is said to show in 80 % of all cases."""
    rng = np.random.default_rng([methods, seeds, 1])
    family = 2 * (methods - 1)
    noise, spreads = NOISE["normal"], np.ones(methods)
    shape = judge(differences(rng, methods, seeds, spreads, noise), family)[0]
    size = shape.smallest / shape.spread * math.sqrt(2)  # the spread of a difference of two
    effects = np.r_[np.zeros(methods - 1), size]
    found = [
        judge(differences(rng, methods, seeds, spreads, noise, effects), family)[-1] for _ in range(studies)
    ]
    return {
        "methods": methods,
        "seeds": seeds,
        "studies": studies,
        "seen": float(np.mean([f.differs for f in found])),
    }


def study(
    rng: np.random.Generator,
    methods: int,
    configurations: int,
    effect: float,
    conditions: int = 1,
    relation: float = 0.0,
    slopes: float = 0.0,
    shared: float = 0.0,
    seeds: int = 3,
) -> pd.DataFrame:
    """Final runs: x and y of a run are its method's effect, its configuration's and its own.

    Args:
        effect: standard deviation of the methods' effects, in that of the configurations'.
        relation: correlation of x and y between configurations of one method.
        slopes: standard deviation of what each method adds to that correlation.
        shared: correlation of the methods' effects on x and y.
    """
    m, c, s, k = np.meshgrid(*map(range, (methods, configurations, seeds, conditions)), indexing="ij")
    m, c, s, k = m.ravel(), c.ravel(), s.ravel(), k.ravel()
    of_method = effect * rng.standard_normal((methods, 2))
    of_method[:, 1] = shared * of_method[:, 0] + math.sqrt(1 - shared**2) * of_method[:, 1]
    own = rng.standard_normal((methods, configurations, 2))
    rho = np.clip(relation + slopes * rng.standard_normal((methods, 1)), -1, 1)
    own[..., 1] = rho * own[..., 0] + np.sqrt(1 - rho**2) * own[..., 1]
    values = of_method[m] + own[m, c] + 0.5 * rng.standard_normal((len(m), 2))
    radii = 2 if configurations % 2 == 0 else 1
    return pd.DataFrame(
        {
            "condition": k,
            "method": m,
            "configuration": c,
            "seed": s,
            "hyper.lr": c // radii,
            "hyper.rho": c % radii,
            "x": values[:, 0],
            "y": values[:, 1],
        }
    )


def pooled(runs: pd.DataFrame) -> bool:
    """Whether the correlation over all runs, with an interval by configuration alone, has a sign."""
    statistic = Kendall(runs["x"], runs["y"], runs["condition"])
    clusters = runs.groupby(["condition", "method", "configuration"]).ngroup()
    return clustered_jackknife(statistic, clusters, fewest=9).excludes(0)


def relate(studies: int, methods: int, configurations: int, effect: float, **options: Any) -> dict[str, Any]:
    """False signs and coverage in studies without a relation."""
    rng = np.random.default_rng([methods, configurations, int(10 * effect)])
    found: list[Relation] = []
    before = 0
    for _ in range(studies):
        runs = study(rng, methods, configurations, effect, **options)
        found.append(relation(runs, "x", "y", HYPER))
        before += pooled(runs)
    names = dict.fromkeys(name for one in found for name in one.levels)
    coverage = {}
    for name in names:
        known = [one.levels[name] for one in found if one.levels[name].known]
        coverage[name] = float(np.mean([not i.excludes(0) for i in known])) if known else None
    return {
        "methods": methods,
        "configurations": configurations,
        "effect": effect,
        **options,
        "studies": studies,
        "false_signs": float(np.mean([one.sign != 0 for one in found])),
        "coverage": coverage,
        "pooled_false_signs": before / studies,
    }


def detect(studies: int, methods: int, configurations: int, **options: Any) -> dict[str, Any]:
    """Verdicts on studies in which there is something to be found."""
    rng = np.random.default_rng([methods, configurations, 2])
    made = [relation(study(rng, methods, configurations, **options), "x", "y", HYPER) for _ in range(studies)]
    verdicts = [one.verdict for one in made]
    wrong = [one.sign * np.sign(options["relation"]) < 0 for one in made]
    return {
        "methods": methods,
        "configurations": configurations,
        **options,
        "studies": studies,
        "verdicts": {name: verdicts.count(name) / studies for name in sorted(set(verdicts))},
        "wrong_signs": float(np.mean(wrong)),
    }


#: studies of each setting of `compare`: many methods take long
STUDIES = {3: 4000, 7: 1000, 12: 800}


def all_differences(share: float) -> dict[str, Any]:
    """Everything about differences."""
    settings = [(spread, "normal") for spread in SPREADS]
    settings += [("equally stable", noise) for noise in NOISE if noise != "normal"]
    return {
        "differences": [
            compare(counted(STUDIES[methods], share), methods, seeds, spread, noise)
            for methods, seeds in itertools.product(STUDIES, (3, 5))
            for spread, noise in settings
        ],
        "visible_at_80_percent": [
            seen(counted(800, share), methods, seeds) for methods in STUDIES for seeds in (3, 5, 10)
        ],
    }


def all_relations(share: float) -> dict[str, Any]:
    """Everything about the relation of flatness and generalization."""
    related = []
    for methods, configurations, effect in itertools.product((3, 6, 12), (3, 6, 12, 30), (0.0, 1.0, 2.0)):
        total = methods * configurations
        studies = 240 if total <= 72 else 120 if total <= 150 else 60
        related.append(relate(counted(studies, share), methods, configurations, effect))
    few = counted(200, share)
    true = {"effect": 1.0, "relation": -0.7, "shared": -0.7}
    simpson = {"effect": 2.0, "relation": -0.8, "shared": 0.9}
    return {
        "relation": related,
        "relation_conditions": [relate(few, 6, 6, effect, conditions=3) for effect in (0.0, 2.0)],
        "relation_slopes": [
            relate(few, m, c, 1.0, slopes=0.5) for m, c in ((3, 6), (6, 6), (6, 12), (12, 6))
        ],
        "relation_true": [detect(few, m, c, **true) for m, c in ((3, 12), (6, 6), (12, 6))],
        "relation_simpson": [detect(few, m, 6, **simpson) for m in (6, 12)],
    }


def worst(found: dict[str, Any]) -> dict[str, float]:
    """The largest error rates and the smallest coverages of all settings."""
    related = [*found["relation"], *found["relation_conditions"], *found["relation_slopes"]]
    normal = [row for row in found["differences"] if row["noise"] == "normal"]
    known = [v for row in related for v in row["coverage"].values() if v is not None]
    return {
        "false_claims_normal": max(row["false_claims"] for row in normal),
        "false_claims_any_noise": max(row["false_claims"] for row in found["differences"]),
        "false_claims_test_any_noise": max(row["false_claims_test"] for row in found["differences"]),
        "coverage_normal": min(row["coverage"] for row in normal),
        "visible": min(row["seen"] for row in found["visible_at_80_percent"]),
        "false_signs": max(row["false_signs"] for row in related),
        "coverage_of_a_level": min(known),
        "pooled_false_signs": max(row["pooled_false_signs"] for row in related),
    }


def counted(studies: int, share: float) -> int:
    return max(20, int(studies * share))


PARTS = {"differences": all_differences, "relations": all_relations}


def main() -> None:
    import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of studies")
    parser.add_argument("--only", choices=[*PARTS], help="simulate this part, keep the other's results")
    arguments = parser.parse_args()
    path = record.RESULTS / "inference.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if arguments.only else {}
    found = {name: value for name, value in kept.items() if name not in ("machine", "command", "worst")}
    for name, simulate in PARTS.items():
        if arguments.only in (None, name):
            start = time.perf_counter()
            found |= simulate(arguments.share)
            found[f"{name}_seconds"] = round(time.perf_counter() - start)
    record.write("inference", {"worst": worst(found), **found})


if __name__ == "__main__":
    main()
