"""Slices and planes against closed forms: quadratics, eigenvalues, lines between models, trajectories."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flatbench.errors import InputError, NotApplicableError
from flatbench.landscape import Line, Trajectory, landscape
from flatbench.landscape.axes import Gradient, Hessian, Random, principal_components
from flatbench.landscape.explore import positions
from flatbench.seeding import derive_seed
from flatbench.subject.objective import Objective
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import subject
from tests.measures.quadratics import Known, known

EIGENVALUES = [9.0, 5, -3, 2, 1, 0.5]


def moved(case: Known, offset: torch.Tensor) -> Subject:
    """The same quadratic at other weights."""
    other = known(EIGENVALUES).subject
    with torch.no_grad():
        other.model.layer.weight.add_(offset.view(3, 2))
    return other


def rise(case: Known, step: torch.Tensor) -> float:
    return float(case.gradient @ step + step @ case.curvature @ step / 2)


@pytest.mark.parametrize("stack", [1, None])
def test_a_plane_over_a_quadratic(stack: int | None) -> None:
    case = known(EIGENVALUES)
    found = landscape(case.subject, dims=2, points=7, distance=1.5, stack=stack)
    with in_space(case.subject, "merged") as point:
        seed = derive_seed(5, "slice", 0)
        d1, d2 = [a.direction[0].flatten() for a in Random().draw(case.subject, point, seed, 2)]
    for row in found.values().itertuples():
        assert row.value == pytest.approx(found.loss + rise(case, row.x * d1 + row.y * d2), rel=1e-9)
    assert len(found.frame) == 49
    assert found.frame["computed"].all()


def test_along_the_gradient() -> None:
    case = known(EIGENVALUES)
    found = landscape(case.subject, "gradient", points=11, distance=0.4)
    g = case.gradient / case.gradient.norm()
    expected = [found.loss + rise(case, t * g) for t in found.values()["x"]]
    assert found.values()["value"].tolist() == pytest.approx(expected, rel=1e-9)
    assert found.meta["axes"][0][0]["gradient_norm"] == pytest.approx(float(case.gradient.norm()))


def test_second_differences_along_eigenvectors_are_eigenvalues() -> None:
    case = known(EIGENVALUES)
    found = landscape(case.subject, Hessian(tol=1e-12), dims=2, points=5, distance=0.5)
    assert [axis["eigenvalue"] for axis in found.meta["axes"][0]] == pytest.approx([9.0, 5.0], rel=1e-6)
    surface = found.values().pivot(index="x", columns="y", values="value").to_numpy()
    h = 0.25
    along_first = (surface[3, 2] + surface[1, 2] - 2 * surface[2, 2]) / h**2
    along_second = (surface[2, 3] + surface[2, 1] - 2 * surface[2, 2]) / h**2
    mixed = (surface[3, 3] + surface[1, 1] - surface[3, 1] - surface[1, 3]) / (4 * h**2)
    assert (along_first, along_second) == pytest.approx((9.0, 5.0), rel=1e-6)
    assert mixed == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("space", ["adapter", "merged"])
def test_second_differences_of_a_real_model(space: str) -> None:
    given = subject("vit_lora")
    axes = Hessian(tol=1e-9, max_products=3000)
    found = landscape(given, axes, space=space, points=3, distance=1e-3, dims=1)
    left, middle, right = found.values()["value"]
    value = found.meta["axes"][0][0]["eigenvalue"]
    assert (left + right - 2 * middle) / 1e-6 == pytest.approx(value, rel=1e-4)


def test_the_default_span_of_an_eigenvector_is_where_the_parabola_has_risen_by_one() -> None:
    case = known(EIGENVALUES, slope=0.0)
    found = landscape(case.subject, Hessian(tol=1e-12), points=3)
    assert found.values()["value"].iloc[-1] - found.loss == pytest.approx(1.0, rel=1e-6)


def test_a_line_between_two_checkpoints() -> None:
    case = known(EIGENVALUES)
    offset = torch.arange(6).double() / 3
    other = moved(case, offset)
    found = landscape(case.subject, Line(other, "the other"), points=9)
    by_position = found.values().set_index("x")["value"]
    assert by_position[0.0] == found.loss
    for t, value in by_position.items():
        assert value == pytest.approx(found.loss + rise(case, t * offset), rel=1e-9)
    with in_space(other, "merged") as point:
        there = Objective(other, point, None).value()
    assert by_position[1.0] == pytest.approx(there, rel=1e-10)
    assert "the other (0 = here, 1 = there)" in found.axes[0]


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
def test_a_line_of_real_models_ends_at_the_other(space: str, caplog: pytest.LogCaptureFixture) -> None:
    """Or says that it does not, where a head outside the space is another one."""
    here, there = subject("vit_head"), subject("vit_head")
    with torch.no_grad():
        for parameter in there.model.parameters():
            parameter.add_(0.1)
    with in_space(there, space) as point:
        weights = [p.detach().clone() for p in point.parameters.values()]
    with in_space(here, space) as point:  # outside the space, the models stay different
        step = [w - p.detach() for w, p in zip(weights, point.parameters.values(), strict=True)]
        with point.moved(step):
            loss = Objective(here, point, None).value()
    found = landscape(here, Line(there), space=space, points=5)
    assert found.values().set_index("x")["value"][1.0] == pytest.approx(loss, rel=1e-9)
    own = Objective(there, SimpleNamespace(model=there.model.eval(), parameters={}), None).value()
    assert (own == pytest.approx(loss, rel=1e-5)) is (space == "all")
    assert ("all others from here" in found.axes[0]) is (space != "all")
    assert ("such as a head" in caplog.text) is (space != "all")


def test_a_trajectory_lies_in_its_plane() -> None:
    case = known(EIGENVALUES)
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, dtype=torch.float64)
    offsets = [2 * a + b, a - b, 0.5 * a + 0.3 * b]
    found = landscape(case.subject, Trajectory([moved(case, o) for o in offsets]), points=9)
    assert found.dims == 2
    path = found.path()
    assert path.to_numpy()[-1].tolist() == [0, 0]
    shares = [axis["variance_share"] for axis in found.meta["axes"][0]]
    assert shares[0] > shares[1]
    assert sum(shares) == pytest.approx(1)
    lengths = np.hypot(path["x"], path["y"])
    assert lengths.tolist() == pytest.approx([float(o.norm()) for o in offsets] + [0.0], rel=1e-9)
    assert found.frame["x"].min() < path["x"].min()
    assert found.frame["x"].max() > path["x"].max()


@pytest.mark.parametrize("space", ["adapter", "all"])
def test_a_trajectory_that_leaves_out_a_head_says_so(space: str, caplog: pytest.LogCaptureFixture) -> None:
    here, *earlier = (subject("vit_head") for _ in range(3))
    for distance, one in enumerate(earlier, 1):
        torch.manual_seed(distance)
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    landscape(here, Trajectory(earlier), space=space, points=3)
    assert ("leaves out weights that changed" in caplog.text) is (space != "all")


def test_principal_components_are_those_of_numpy() -> None:
    torch.manual_seed(1)
    steps = [[torch.randn(3, 2).double(), torch.randn(4).double()] for _ in range(6)]
    components, shares = principal_components(steps, 2)
    matrix = np.array([np.concatenate([p.flatten() for p in parts]) for parts in steps])
    _, sizes, rows = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    for component, row in zip(components, rows, strict=False):
        ours = np.concatenate([p.flatten() for p in component])
        assert abs(ours @ row) == pytest.approx(1, rel=1e-9)
    assert shares == pytest.approx((sizes[:2] ** 2 / (sizes**2).sum()).tolist())


@pytest.mark.parametrize("name", ["vit_head", "bert_lora", "mlp_full", "gpt2_lora"])
def test_the_origin_is_the_checkpoint_s_loss_exactly(name: str) -> None:
    given = subject(name)
    found = landscape(given, points=5, draws=2)
    for _, line in found.values().groupby("draw"):
        assert line.set_index("x")["value"][0.0] == found.loss
    with in_space(given, "merged") as point:
        plain = Objective(given, point, None).value()
    rel = 1e-6 if name == "gpt2_lora" else 1e-12  # transformers computes its loss in float32
    assert found.loss == pytest.approx(plain, rel=rel)


def test_the_origin_of_one_batch_is_equal_bit_for_bit() -> None:
    given = subject("vit_lora")
    given = replace(given, batches=given.batches[:1])
    with in_space(given, "merged") as point:
        assert landscape(given, points=3).loss == Objective(given, point, None).value()


def test_at_a_minimum_the_origin_is_the_lowest_point() -> None:
    case = known([9.0, 5, 3, 2, 1, 0.5], slope=0.0)
    for found in (landscape(case.subject, dims=2, points=9), landscape(case.subject, draws=3)):
        assert found.values()["value"].min() == found.loss


def test_positions_hold_zero_and_the_span() -> None:
    assert positions(-1, 1, 5) == [-1, -0.5, 0, 0.5, 1]
    found = positions(-0.3, 2.1, 9)
    assert 0.0 in found
    assert np.diff(found) == pytest.approx([0.3] * 8)
    assert positions(1.0, 2.0, 5)[0] == 0.0
    assert positions(-2.0, -1.0, 5)[-1] == 0.0


def test_directions_that_make_no_sense() -> None:
    case = known(EIGENVALUES)
    flat = known(EIGENVALUES, slope=0.0)
    with pytest.raises(InputError, match="unknown direction 'sideways'"):
        landscape(case.subject, "sideways")
    with pytest.raises(InputError, match="one direction"):
        landscape(case.subject, Gradient(), dims=2)
    with pytest.raises(InputError, match="same weights"):
        landscape(case.subject, Line(known(EIGENVALUES).subject))
    with pytest.raises(InputError, match="correspond"):
        landscape(case.subject, Line(known([1.0] * 9).subject))
    with pytest.raises(InputError, match="at least two"):
        Trajectory([case.subject])
    ones = [moved(case, torch.ones(6).double() * i) for i in (1, 2, 3)]
    with pytest.raises(InputError, match="fewer than 2 dimensions"):
        landscape(case.subject, Trajectory(ones))
    flat.subject.model.curvature.zero_()
    flat.subject.model.slope.zero_()
    with pytest.raises(NotApplicableError, match="gradient is zero"):
        landscape(flat.subject, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 4}, "points"),
        ({"draws": 0}, "draws"),
        ({"along": "gradient", "draws": 2}, "draws"),
        ({"dims": 3}, "dims"),
        ({"distance": -1.0}, "distance"),
        ({"distance": (1.0, 2.0)}, "distance"),
        ({"adaptive": 2.0}, "adaptive"),
        ({"only": "nowhere"}, "found in no weight's name"),
        ({"only": "("}, "no regular expression"),
        ({"along": ("random", "gradient", "hessian")}, "one or two"),
    ],
)
def test_bad_requests(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        landscape(known(EIGENVALUES).subject, **options)
