"""A model in shards over several processes is trained to what one process reaches with the whole model."""

from __future__ import annotations

from pathlib import Path

import process_cases as cases
import pytest
from test_process_groups import distance

from flatbench import distributed, state


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.long)])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What a group of real processes over gloo has trained."""
    folder = tmp_path_factory.mktemp(f"shards{request.param}")
    distributed.launch(cases.everything_in_shards, folder, request.param)
    return folder, request.param


CASES = [*((True, name) for name in cases.METHODS), *((False, name) for name in cases.WITHOUT_ADAPTER)]


@pytest.mark.parametrize(
    ("adapted", "name", "keep"),
    [(*case, keep) for case in CASES for keep in ((False, True) if case[1] in cases.KEPT else (False,))],
)
def test_shards_are_trained_as_the_whole_model(
    group: tuple[Path, int], adapted: bool, name: str, keep: bool
) -> None:
    folder, size = group
    alone = cases.trainer_of(name, cases.base_of(name), adapted, evaluate_every=int(keep))
    trains = list(alone.parameters) if adapted else []
    numbers = sum(p.numel() for name, p in alone.bare.named_parameters() if name not in trains)
    expected = cases.trained(alone)
    found = [state.load(folder / f"{name}-{adapted}-{keep}-{rank}") for rank in range(size)]
    assert distance(found[0]["parameters"], expected["parameters"]) <= 1e-6
    for other in found[1:]:
        assert distance(other["parameters"], found[0]["parameters"]) == 0, "all put the same together"
    for row, other in zip(found[0]["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-6, nan_ok=True)
    assert sum(f["own"] for f in found) == numbers, "every number lies in one process"
    assert max(f["own"] for f in found) < 1.5 * numbers / size
