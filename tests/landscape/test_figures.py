"""Figures: what they are given, what they give back, what is written on them."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest

from flatbench.errors import InputError
from flatbench.landscape import (
    Landscape,
    Line,
    Trajectory,
    landscape,
    plot_plane,
    plot_slice,
    plot_surface,
    plot_surface_plotly,
)
from tests.measures.measure_cases import subject
from tests.measures.quadratics import known


@pytest.fixture(autouse=True)
def never_shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("plt.show was called"))
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def plane() -> Landscape:
    given = subject("vit_lora")
    return landscape(
        given, dims=2, points=15, adaptive=True, data={"train": given.batches, "test": given.batches[:1]}
    )


@pytest.fixture(scope="module")
def slices() -> Landscape:
    given = subject("vit_lora")
    return landscape(given, draws=3, points=7, data={"train": given.batches, "test": given.batches[:1]})


def texts(ax) -> str:
    figure = ax.figure
    every = [t.get_text() for a in figure.axes for t in (a.xaxis.label, a.yaxis.label, a.title)]
    legend = ax.get_legend()
    return " ".join([*every, *(t.get_text() for t in (legend.get_texts() if legend else ()))]).replace(
        "\n", " "
    )


def test_a_slice_draws_mean_and_range_of_the_draws(slices: Landscape) -> None:
    ax = plot_slice(slices)
    assert len(ax.lines) == 3  # two splits and the line at the checkpoint
    mean = slices.spread()["mean"]
    assert np.asarray(ax.lines[0].get_ydata()).tolist() == mean.tolist()
    assert len(ax.collections) == 2
    assert "filter-normalised" in texts(ax)
    assert "loss (nats)" in texts(ax)
    assert "train test" in texts(ax)


def test_it_draws_on_the_axes_that_it_is_given(slices: Landscape, plane: Landscape) -> None:
    _, axes = plt.subplots(1, 2)
    before = len(plt.get_fignums())
    assert plot_slice(slices.frame, axes[0], xlabel="here", splits=["test"], log=True) is axes[0]
    assert plot_plane(plane, ax=axes[1]) is axes[1]
    assert len(plt.get_fignums()) == before
    assert axes[0].get_xlabel() == "here"
    assert axes[0].get_yscale() == "log"


def test_several_landscapes_share_one_figure(slices: Landscape) -> None:
    ax = plot_slice({"LoRA": slices, "SAM": slices}, splits=["train"])
    assert "LoRA SAM" in texts(ax)


def test_a_plane_shows_the_checkpoint_and_what_was_computed(plane: Landscape) -> None:
    ax = plane.plot(split="test")
    assert "computed checkpoint" in texts(ax)
    assert ax.get_title() == "test"
    dots = next(line for line in ax.lines if line.get_label() == "computed")
    assert len(dots.get_xdata()) == plane.values().query("computed").shape[0]


def test_a_trajectory_is_drawn_in_its_plane() -> None:
    import torch

    case = known([9.0, 5, 3, 2, 1, 0.5])
    earlier = []
    for i in (3, 2, 1):
        other = known([9.0, 5, 3, 2, 1, 0.5]).subject
        with torch.no_grad():
            other.model.layer.weight.add_(i * torch.tensor([[1.0, 0], [0, i], [0, 0]]).double())
        earlier.append(other)
    found = landscape(case.subject, Trajectory(earlier), points=9)
    ax = plot_plane(found)
    line = next(line for line in ax.lines if line.get_label() == "training")
    assert np.asarray(line.get_xdata()).tolist() == found.path()["x"].tolist()
    assert "variance" in texts(ax)


def test_levels_by_ratio_where_values_span_decades(plane: Landscape) -> None:
    frame = plane.frame.copy()
    frame["value"] = 10 ** (3 * frame["x"] ** 2 + frame["y"] ** 2)
    assert "(log scale)" in texts(plot_plane(frame))
    assert "(log scale)" not in texts(plot_plane(frame, log=False))
    frame["value"] = frame["x"]
    with pytest.raises(InputError, match="not all positive"):
        plot_plane(frame, log=True)


def test_values_that_are_not_finite_stay_white(plane: Landscape) -> None:
    frame = plane.frame.copy()
    frame.loc[:10, "value"] = np.inf
    plot_plane(frame)
    frame["value"] = np.nan
    with pytest.raises(InputError, match="no finite value"):
        plot_plane(frame)


def test_a_flat_plane_can_be_drawn(plane: Landscape) -> None:
    frame = plane.frame.copy()
    frame["value"] = 1.0
    plot_plane(frame)


def test_surfaces(plane: Landscape) -> None:
    ax = plot_surface(plane)
    assert ax.name == "3d"
    with pytest.raises(InputError, match="projection"):
        plot_surface(plane, ax=plt.subplots()[1])
    pytest.importorskip("plotly")
    figure = plot_surface_plotly(plane, split="test")
    values = plane.values(split="test").pivot(index="x", columns="y", values="value")
    assert np.asarray(figure.data[0].z).tolist() == values.to_numpy().T.tolist()


def test_what_cannot_be_drawn(plane: Landscape, slices: Landscape) -> None:
    for draw, message in (
        (lambda: plot_slice(plane), "this is a plane"),
        (lambda: plot_plane(slices), "no plane"),
        (lambda: plot_slice(slices, quantity="lost"), r"no quantity 'lost' here; did you mean 'loss'\?"),
        (lambda: plot_slice(slices, splits=["dev"]), "no split 'dev'"),
        (lambda: plot_plane(plane, draw=7), "no draw 7"),
        (lambda: plot_slice(slices.frame.drop(columns="value")), "columns value"),
    ):
        with pytest.raises(InputError, match=message):
            draw()


@pytest.mark.parametrize("along", ["random", "gradient", "hessian", "line"])
def test_no_label_is_cut_or_overlaps_at_the_default_size(along: str) -> None:
    given = subject("vit_lora")
    axes = Line(shifted(), "a checkpoint with a long name") if along == "line" else along
    for found in (landscape(given, axes, points=5), landscape(given, [axes, "random"], points=5)):
        ax = found.plot()
        figure = ax.figure
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        boxes = [
            item.get_window_extent(renderer)
            for a in figure.axes
            for item in (a.xaxis.label, a.yaxis.label, a.title)
            if item.get_text()
        ]
        whole = figure.bbox
        for i, box in enumerate(boxes):
            assert box.x0 >= -1
            assert box.y0 >= -1
            assert box.x1 <= whole.x1 + 1
            assert box.y1 <= whole.y1 + 1
            assert not any(box.overlaps(rest) for rest in boxes[i + 1 :])


def shifted():
    import torch

    found = subject("vit_lora")
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return found
