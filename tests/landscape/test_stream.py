"""Points on disk: an interrupted plane goes on, and ends like one that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from flatbench.errors import InputError
from flatbench.landscape import landscape
from tests.measures.measure_cases import subject

OPTIONS = {"dims": 2, "points": 5, "draws": 2}


def stop_after(count: int):
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stack", [1, 4])
def test_resumed_is_uninterrupted(tmp_path: Path, stack: int, adaptive: bool) -> None:
    given = subject("vit_lora")
    options = {**OPTIONS, "points": 15 if adaptive else 5, "adaptive": adaptive, "stack": stack}
    whole = landscape(given, **options)
    path = tmp_path / "plane.jsonl"
    for stop in (3, 17, 30):
        with pytest.raises(KeyboardInterrupt):
            landscape(given, **options, stream=path, progress=stop_after(stop))
    seen: list[int] = []
    found = landscape(given, **options, stream=path, progress=lambda done, total: seen.append(done))
    assert min(seen) == 31
    assert found.meta["resumed_points"] == 30
    exact = stack == 1
    pd.testing.assert_frame_equal(found.frame, whole.frame, check_exact=exact, rtol=1e-9)


def test_a_finished_landscape_is_read_and_not_computed(tmp_path: Path) -> None:
    given = subject("bert_lora")
    path = tmp_path / "slice.jsonl"
    first = landscape(given, points=5, stream=path)
    written = path.read_text()
    again = landscape(given, points=5, stream=path, progress=lambda *_: pytest.fail("computed"))
    pd.testing.assert_frame_equal(first.frame, again.frame, check_exact=True)
    assert again.meta == json.loads(json.dumps(first.meta))
    assert path.read_text() == written


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    given = subject("vit_lora")
    path = tmp_path / "slice.jsonl"
    first = landscape(given, points=5, stream=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:10])
    again = landscape(given, points=5, stream=path)
    assert again.meta["resumed_points"] == 3
    assert again.frame["value"].tolist() == pytest.approx(first.frame["value"].tolist(), rel=1e-9)


def test_other_weights_data_or_functions_are_another_landscape(tmp_path: Path) -> None:
    given = subject("vit_lora")
    path = tmp_path / "slice.jsonl"

    def key(**options: object) -> str:
        return landscape(given, points=3, stream=path, **options).meta["key"]

    def one(logits: Tensor, labels: Tensor) -> float:
        return 1.0

    scale = 2.0

    def scaled(logits: Tensor, labels: Tensor) -> float:
        return scale

    keys = [
        key(),
        key(data={"train": given.batches[:2]}),
        key(functions=[one]),
        key(seed=4),
        key(space="all"),
    ]
    keys += [key(functions=[scaled]), key(only="q_proj"), key(distance=0.5)]
    scale = 3.0
    keys.append(key(functions=[scaled]))
    with torch.no_grad():
        next(given.model.parameters()).add_(1e-3)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        landscape(subject("vit_lora"), points=3, stream=tmp_path / "file" / "plane.jsonl")


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    from tests.measures.quadratics import known

    path = tmp_path / "slice.jsonl"
    case = known([9.0, 5, 3, 2, 1, 0.5])
    landscape(case.subject, points=3, distance=1e200, stream=path)
    assert "NaN" not in path.read_text()
    again = landscape(case.subject, points=3, distance=1e200, stream=path)
    assert again.values()["value"].isna().tolist() == [True, False, True]
