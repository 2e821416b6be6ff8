"""Study files that somebody sends: each is valid, or refused with its field named; none does anything."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from flatbench import measures, optim, store, tasks
from flatbench import study as flatbench_study
from flatbench.config.registry import Registry
from flatbench.config.yaml import parse
from flatbench.errors import InputError, shown
from flatbench.study import plan
from flatbench.study.schema import StudyFile
from tests.fuzzing import Watch, documents, studies

pytestmark = pytest.mark.slow


SECTIONS = tuple(StudyFile.model_fields)
BASES = documents()
WATCH = Watch()
QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
CASES, SHARDS = 100_000, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a link that leads out of it, and the modules that plug-ins need already imported."""
    made = tmp_path_factory.mktemp("fuzz")
    (made / "data").mkdir()
    (made / "data" / "link").symlink_to("/etc")
    kinds: list[Registry] = [tasks.REGISTRY, optim.REGISTRY, measures.REGISTRY]
    for registry in kinds:
        for name in registry.names():
            registry.options(name)
    before = Path.cwd()
    os.chdir(made)
    try:
        for base in BASES:
            one(made, yaml.safe_dump(base, sort_keys=False), watched=False)
        yield made  # type: ignore[misc]
    finally:
        os.chdir(before)


def one(folder: Path, text: str | bytes, watched: bool = True) -> str | None:
    """Read a study file and plan its runs if they are few; the message if it is refused.

    Planning opens data and models, which `folder` does not have: what is reached before that is watched.
    """
    file = folder / "s.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        # a name on the hub is looked for in its client's cache
        with WATCH.on(folder, Path(os.environ["FLATBENCH_CACHE"]), Path(constants.HF_HOME)):
            loaded = flatbench_study.load(str(file))
            if sum(len(trials) for c in loaded.conditions for trials in c.trials.values()) < 50:
                planned = plan.Plan(loaded, store.StudyFolder(folder, loaded.name))
                store.digest(planned.snapshot())
        return None
    except InputError as error:
        return str(error)
    finally:
        assert not watched or not WATCH.seen, WATCH.seen
        assert sorted(p.name for p in folder.iterdir()) == ["data", "s.yaml"]


def check(folder: Path, text: str | bytes) -> None:
    message = one(folder, text)
    if message is None:
        return
    assert message.isprintable(), message
    assert len(message) < 3000
    source = f"{folder / 's.yaml'}: "
    assert message.startswith(source)
    problem = message.removeprefix(source)
    try:
        content = parse((folder / "s.yaml").read_text(encoding="utf-8"))
    except ValueError:
        assert problem.startswith("not readable as plain YAML: "), message
        return
    if isinstance(content, dict):
        assert names_a_field(problem, content), message
    else:
        assert problem.startswith("expected a mapping of sections, found "), message


def names_a_field(problem: str, content: dict[object, object]) -> bool:
    """Whether a message begins with a place in the file: a section that is there, or one that is missing."""
    # of a grid's conditions, the one that it is about comes first
    field, colon, rest = re.sub(r"^condition \S+: ", "", problem).partition(": ")
    first = re.split(r"[.\[ ]", field)[0]
    if not colon:
        return False
    if field == "the file":  # a key that is no text has no name
        return any(not isinstance(key, str) or len(key) > 200 for key in content)
    if first in content:
        listed, place = content[first], re.match(r"\w+\[(\d+)\]", field)
        return place is None or (isinstance(listed, list) and int(place[1]) < len(listed))
    if any(field.startswith(shown(key).removesuffix("...") or "''") for key in content):
        return True  # with points, spaces or brackets in its name
    if first in SECTIONS:
        grid = content.get("grid")  # which may set options of a section that is not written
        return "missing" in rest or (isinstance(grid, dict) and any(first in str(key) for key in grid))
    return False


@settings(QUIET, max_examples=400)
@given(text=studies(BASES))
def test_studies_that_were_tampered_with(folder: Path, text: str) -> None:
    check(folder, text)


@settings(QUIET, max_examples=300)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_files_of_anything(folder: Path, content: bytes) -> None:
    check(folder, content)


@pytest.mark.long
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_hundred_thousand_studies(folder: Path, shard: int) -> None:
    @seed(shard)
    @settings(QUIET, max_examples=CASES // SHARDS, derandomize=False)
    @given(text=studies(BASES))
    def search(text: str) -> None:
        check(folder, text)

    search()
