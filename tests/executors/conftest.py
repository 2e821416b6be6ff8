"""Outcomes that several modules compare theirs with; each costs this process a few seconds."""

from __future__ import annotations

import pytest

from tests.executors import studies


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> studies.Outcome:
    """What `studies.STUDY` finds when nobody is killed."""
    return studies.undisturbed(tmp_path_factory.mktemp("undisturbed"), studies.STUDY)


@pytest.fixture(scope="session")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> studies.Outcome:
    """What `studies.PAIR` finds when nobody is killed."""
    return studies.undisturbed(tmp_path_factory.mktemp("pair"), studies.PAIR)


@pytest.fixture(scope="session")
def undisturbed_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of the four runs that `studies.prepared` makes."""
    return studies.finished_weights(studies.prepared(tmp_path_factory.mktemp("weights")))
