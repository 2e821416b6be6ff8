"""The error that the data make, against plain references and against samples of data that are known whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from flatbench.curvature import MatrixOperator
from flatbench.errors import InputError
from flatbench.measures import sampling
from flatbench.measures.hessian import Hessian
from flatbench.measures.sam_sharpness import SAMSharpness
from flatbench.measures.sampling import (
    CAUTION,
    FIRST,
    GROUPS,
    Sampling,
    Taken,
    dealt,
    drawn,
    measured,
    of_eigenvalues,
    of_mean,
)
from flatbench.measures.sharpness import Sharpness
from flatbench.measures.spectrum import Spectrum
from flatbench.study import resolve_measure
from flatbench.subject.objective import first_examples, rows
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import subject

SPACE = "all"


class Quadratics(nn.Module):
    """A mean of quadratics ``½ (w − c_i)ᵀ diag(h_i) (w − c_i)``, an example each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, h: Tensor, c: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(h * (self.w - c).square() / 2).sum(dim=1).mean())


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["h"])


def data(count: int, size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Curvatures with an outlier in the mean, and centres with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.rand(count, size, generator=generator, dtype=torch.float64).square()
    h[:, 0] *= 8
    return {"h": h, "c": 0.3 + torch.randn(count, size, generator=generator, dtype=torch.float64)}


def of(batch: Mapping[str, Tensor], each: int = 32) -> Subject:
    count = rows(batch)
    batches = [{k: v[i : i + each] for k, v in batch.items()} for i in range(0, count, each)]
    return Subject(Quadratics(batch["h"].shape[1]), batches, loss, [], seed=3)


def picked(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {k: v[index] for k, v in batch.items()}


# -- samples -----------------------------------------------------------------------------------------------


def test_a_larger_sample_holds_a_smaller_one_and_rows_of_one_shape_are_put_together() -> None:
    batches = [{"labels": torch.arange(i, i + 10), "x": torch.ones(10, 3)} for i in range(0, 100, 10)]
    small, large = drawn(batches, 7), drawn(batches, 40)
    taken = [{int(n) for b in sample for n in b["labels"]} for sample in (small, large)]
    assert len(taken[0]) == 7
    assert taken[0] < taken[1]
    assert [len(b["labels"]) for b in small] == [7]
    assert {int(n) // 10 for n in taken[1]} == set(range(10))  # from everywhere, were they sorted by class
    wider = [*batches, {"labels": torch.arange(100, 110), "x": torch.ones(10, 4)}]
    assert sorted(int(n) for b in drawn(wider, 110) for n in b["labels"]) == list(range(110))


def growing(relative_error_of_one: float, total: int, plan: Sampling) -> tuple[dict, list[int]]:
    """A measure whose sampling error is known; and the sizes it was taken at."""
    sizes: list[int] = []

    def take(batches: Sequence[Mapping[str, Tensor]], share: float) -> Taken:
        size = sum(map(rows, batches))
        sizes.append(size)
        error = relative_error_of_one * math.sqrt((1 - share) / size)
        return Taken({"value": 2.0}, [2.0], [2.0 * error], 3 * size)

    batches = [{"x": torch.zeros(50)} for _ in range(total // 50)]
    return measured(batches, plan, take), sizes


def test_the_sample_grows_until_it_is_resolved_and_not_much_further() -> None:
    found, sizes = growing(2.0, 100_000, Sampling(None, 0.1, 10**9))
    assert found["resolved"] is True
    needed = (2 * CAUTION / 0.1) ** 2
    assert needed <= found["examples"] <= 1.25 * needed
    assert found["example_gradients"] == 3 * sum(sizes)


def test_the_budget_ends_the_growing_and_the_value_is_marked() -> None:
    found, sizes = growing(20.0, 100_000, Sampling(None, 0.1, 3000))
    assert found["resolved"] is False
    assert found["example_gradients"] <= 3000
    assert sizes[-1] > sizes[0]


def test_all_examples_leave_no_sampling_error() -> None:
    found, sizes = growing(1e6, 500, Sampling(None, 0.1, 10**9))
    assert (found["resolved"], sizes[-1]) == (True, 500)
    found, sizes = growing(1e6, 500, Sampling(None, None, 1))
    assert (found["resolved"], sizes) == (None, [500])


def test_no_small_sample_resolves_a_value() -> None:
    found, sizes = growing(0.01, 1000, Sampling(64, 0.1, 10**9))
    assert (found["resolved"], sizes) == (False, [64])
    assert growing(0.01, 1000, Sampling(FIRST, 0.1, 10**9))[0]["resolved"] is True
    assert growing(0.01, 50, Sampling(64, 0.1, 10**9))[0]["resolved"] is True  # all there are


def test_caution_is_the_upper_end_for_a_spread_of_so_many_groups() -> None:
    free = GROUPS - 1
    assert pytest.approx(math.sqrt(free / stats.chi2.ppf(0.05, free)), rel=1e-3) == CAUTION


@pytest.mark.parametrize("kind", ["a few hold a quarter", "exponential"])
def test_of_the_samples_that_end_the_growing_nine_in_ten_hold(kind: str) -> None:
    """It is its narrow interval that ends it: 81 % held of the first kind, without caution and from 64 on."""
    generator = np.random.default_rng(0)
    whole = generator.exponential(size=1024)
    if kind == "a few hold a quarter":
        whole = generator.random(1024) + 10 * (generator.random(1024) < 0.03)

    def mean(batches: Sequence[Mapping[str, Tensor]]) -> float:
        return float(torch.cat([b["x"] for b in batches]).mean())

    def take(batches: Sequence[Mapping[str, Tensor]], share: float) -> Taken:
        value, error = mean(batches), of_mean([mean(group) for group in dealt(batches, 0)], share)
        return Taken({"value": value, "error": error}, [value], [error], 1)

    held, ended = 0, 0
    for _ in range(300):
        order = torch.from_numpy(generator.permutation(whole))
        found = measured([{"x": order}], Sampling(None, 0.2, 10**9), take)
        if found["examples"] < 1024:
            ended += 1
            held += abs(found["value"] - float(whole.mean())) <= found["error"]
    assert ended > 150
    assert held >= 0.9 * ended


def test_a_smaller_group_weighs_less() -> None:
    values, weights = [1.0, 2.0, 4.0, 9.0], [8.0, 8.0, 8.0, 2.0]
    mean = np.average(values, weights=weights)
    spread = np.sqrt((np.square(np.array(weights) / 26 * (np.array(values) - mean))).sum() * 4 / 3)
    expected = stats.t.ppf(0.975, 3) * spread * math.sqrt(0.5)
    assert of_mean(values, 0.5, weights) == pytest.approx(float(expected), rel=1e-2)
    assert of_mean(values, 0.5, [3.0] * 4) == pytest.approx(of_mean(values, 0.5), rel=1e-12)


def test_no_radius_at_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"measures\[0\].*rho.*at least 1 item"):
        resolve_measure({"name": "sharpness", "rho": []}, "study", "measures[0]")


@pytest.mark.parametrize("m", [5, 8, 48, 128])
def test_every_batch_size_has_groups_enough_to_tell_a_spread(m: int) -> None:
    found = Sharpness(space=SPACE, rho=[0.5], m=m, examples=128, interval=0.2)(of(data(512)))
    assert math.isfinite(found["sampling_error"])
    assert found["sampling_error"] < found["sharpness"]  # of 2 or 4 groups, Student's t is 12.7 or 3.2


def test_a_number_of_examples_is_kept_to() -> None:
    found, sizes = growing(20.0, 1000, Sampling(100, 0.1, 10**9))
    assert (found["resolved"], sizes) == (False, [100])


# -- errors ------------------------------------------------------------------------------------------------


def test_the_error_of_eigenvalues_is_a_jackknife_over_dense_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{"h": torch.randn(64, 9, generator=generator, dtype=torch.float64)}]

    def matrix(rows_: Tensor) -> Tensor:
        return rows_.T @ rows_ / len(rows_) + torch.diag(torch.tensor([4.0, 3, 0, 0, 0, 0, 0, 0, 0]).double())

    values, vectors = torch.linalg.eigh(matrix(batches[0]["h"]))
    top = vectors[:, [-1, -2]]
    errors, products = of_eigenvalues(lambda b: MatrixOperator(matrix(b[0]["h"])), batches, top, 0.25, seed=3)
    assert products == 2
    parts = [g[0]["h"] for g in dealt(batches, 3)]
    small = [top.T @ matrix(p) @ top for p in parts]
    for i in (0, 1):
        left = [
            torch.linalg.eigvalsh(sum(m for j, m in enumerate(small) if j != g) / (len(small) - 1))[1 - i]
            for g in range(len(small))
        ]
        spread = np.sqrt((len(small) - 1) * np.var(left))
        lifted = (len(small) - 1) * abs(np.mean(left) - float(values[-1 - i]))
        beyond = [float((matrix(p) @ top[:, i]).square().sum()) - float(small[g][:, i].square().sum())
                  for g, p in enumerate(parts)]  # fmt: skip
        lifted += sum(beyond) / (len(parts) * (len(parts) - 1)) / float(values[-1 - i])
        expected = stats.t.ppf(0.975, len(parts) - 1) * spread * math.sqrt(0.75) + 0.75 * lifted
        assert errors[i] == pytest.approx(float(expected), rel=2e-3)  # Student's quantile is approximated


@pytest.mark.slow
def test_intervals_hold_as_often_as_they_say() -> None:
    """95 %, over samples of data whose values are known: a fifth of all examples, 200 times."""
    whole = data(400)
    true = {
        "eigenvalue_1": float(whole["h"].mean(dim=0).max()),
        "trace": float(whole["h"].mean(dim=0).sum()),
        "sharpness": 0.1**2 * float(whole["h"].mean(dim=0).sum()) / 2,
    }
    held = dict.fromkeys(true, 0)
    generator = torch.Generator().manual_seed(1)
    share = 0.2

    def operator(batches: Sequence[Mapping[str, Tensor]]) -> MatrixOperator:
        return MatrixOperator(torch.diag(torch.cat([b["h"] for b in batches]).mean(dim=0)))

    for _ in range(200):
        sample = [picked(whole, torch.randperm(400, generator=generator)[:80])]
        mean = sample[0]["h"].mean(dim=0)
        vector = torch.nn.functional.one_hot(mean.argmax(), len(mean)).double()[:, None]
        error, _ = of_eigenvalues(operator, sample, vector, share, seed=0)
        held["eigenvalue_1"] += abs(float(mean.max()) - true["eigenvalue_1"]) <= error[0]
        error_of_trace, _ = sampling.of_trace(operator, sample, share, seed=0)
        held["trace"] += abs(float(mean.sum()) - true["trace"]) <= error_of_trace
        rises = [0.1**2 * float(g[0]["h"].mean(dim=0).sum()) / 2 for g in dealt(sample, 0)]
        held["sharpness"] += abs(0.1**2 * float(mean.sum()) / 2 - true["sharpness"]) <= of_mean(rises, share)
    assert all(180 <= count <= 199 for count in held.values()), held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "value", "error"),
    [
        (Hessian(space=SPACE, examples=128), "eigenvalue_1", "sampling_error_1"),
        (Spectrum(space=SPACE, examples=128, probes=3, steps=4), "trace", "trace_sampling_error"),
        (SAMSharpness(space=SPACE, examples=128, rho=0.5), "sharpness", "sampling_error"),
        (Sharpness(space=SPACE, examples=128, rho=[0.5]), "sharpness", "sampling_error"),
        (Sharpness(space=SPACE, examples=128, m=None, rho=[0.5]), "sharpness", "sampling_error"),
        (Sharpness(space=SPACE, examples=128, m=8, rho=[0.5]), "sharpness", "sampling_error"),
        (Sharpness(space=SPACE, examples=128, kind="average", rho=[0.5]), "sharpness", "sampling_error"),
    ],
)
def test_every_measure_says_its_sampling_error_and_it_holds(measure, value: str, error: str) -> None:
    whole = data(1024)
    everything = type(measure)(
        **{**{k: v for k, v in vars_of(measure).items() if k != "examples"}, "interval": None}
    )(of(whole))
    assert everything[error] == 0
    assert everything["resolved"] is None
    generator = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(10):
        found = measure(of(picked(whole, torch.randperm(1024, generator=generator))))
        assert found["examples"] == 128
        held += abs(found[value] - everything[value]) <= found[error]
        assert found["resolved"] == (CAUTION * found[error] <= 0.2 * abs(found[value]))
    assert held >= 7


def vars_of(measure: object) -> dict:
    """The options that the parametrisation above sets."""
    names = ("space", "rho", "m", "kind", "probes", "steps")
    return {name: getattr(measure, name) for name in names if hasattr(measure, name)}


def test_by_default_the_tolerance_is_a_tenth_of_the_sampling_error() -> None:
    given = of(data(512))
    coarse, fine = (
        Hessian(space=SPACE, examples=64)(given),
        Hessian(space=SPACE, examples=64, tol=1e-6)(given),
    )
    relative = coarse["sampling_error_1"] / coarse["eigenvalue_1"]
    assert coarse["tol"] <= max(relative / 10, 1e-3) * 1.0001
    assert coarse["error_1"] <= coarse["sampling_error_1"] / 5
    assert coarse["sampling_error_1"] == pytest.approx(fine["sampling_error_1"], rel=0.1)
    assert Hessian(space=SPACE, interval=None)(given)["tol"] == 1e-3


def test_by_default_measures_take_what_resolves_them() -> None:
    given = of(data(2000))
    for measure, error, value in (
        (Hessian(space=SPACE), "sampling_error_1", "eigenvalue_1"),
        (Sharpness(space=SPACE, kind="average", rho=[0.1]), "sampling_error", "sharpness"),
    ):
        found = measure(given)
        assert found["resolved"] is True
        assert FIRST <= found["examples"] < 2000
        assert CAUTION * found[error] <= 0.2 * found[value]


def test_a_part_for_m_sharpness_has_m_examples_whatever_the_batches() -> None:
    given = subject("vit_full")
    small = replace(
        given,
        batches=[{k: v[i : i + 1] for k, v in b.items()} for b in given.batches for i in range(rows(b))],
    )
    options = {"rho": [0.1], "m": 4, "steps": 3}
    one, other = Sharpness(**options)(given), Sharpness(**options)(small)
    assert one["batches"] == other["batches"] == 4
    assert one["sharpness"] == pytest.approx(other["sharpness"], rel=1e-9)


def test_growing_changes_nothing_that_is_left_behind() -> None:
    given = of(data(600))
    before = given.model.w.detach().clone()
    state = torch.get_rng_state()
    for measure in (Hessian(space=SPACE), SAMSharpness(space=SPACE), Sharpness(space=SPACE)):
        measure(given)
    assert torch.equal(given.model.w.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert first_examples(given.batches, 600) == given.batches
