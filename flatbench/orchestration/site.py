"""The site file: what a study does not say because it differs from machine to machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flatbench import executors
from flatbench.config.registry import Options
from flatbench.config.validation import as_mapping, plugin, validated
from flatbench.config.yaml import parse, read_text
from flatbench.errors import InputError
from flatbench.executors.base import GRACE, Executor
from flatbench.orchestration.queue import Drive
from flatbench.store.claims import LEASE


class Site(Options):
    """Settings of the place where runs run; none of them changes what a run finds.

    Attributes:
        executor: an executor's name, or its name and options.
        retries: how often a run whose worker died is tried again.
        backoff: seconds before it is, the first time; twice as many each further time.
        lease: seconds without a sign of life after which another machine takes a run over.
        grace: seconds that runs get to save where they are when the study is stopped.
        trackers: experiment trackers that runs report to, by name or by name and options; see
            `flatbench.runs.trackers.choose`.
    """

    executor: str | dict[str, Any] = "local"
    retries: Annotated[int, Field(ge=0)] = 2
    backoff: Annotated[float, Field(ge=0)] = 5.0
    lease: Annotated[float, Field(gt=0)] = LEASE
    grace: Annotated[float, Field(ge=0)] = GRACE
    trackers: list[str | dict[str, Any]] = []


def read(path: Path | None) -> Site:
    """A site file, or the settings of a machine without one.

    Raises InputError for a file that is not there or not valid; the message names the field.
    """
    if path is None:
        return Site()
    try:
        content = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as plain YAML: {error}") from None
    site: Site = validated(Site, content or {}, str(path))
    return site


def executor(site: Site, source: str, name: str | None = None, jobs: int | None = None) -> Executor:
    """The executor of a site.

    Args:
        source: the site file, for messages.
        name: another one than the site's; it gets the site's options only if they are meant for it.
        jobs: runs side by side, of the local executor.

    Raises InputError for an executor or options that there are not.
    """
    asked = as_mapping(site.executor, source, "executor")
    if name is not None and name != asked.get("name"):
        asked = {"name": name}
    if jobs is not None:
        if asked["name"] != "local":
            raise InputError(
                f"--jobs is for the local executor; what the {asked['name']} executor runs at once is said "
                "in a site file (--site)"
            )
        asked["jobs"] = jobs
    chosen, options = plugin(executors.REGISTRY, asked, source, "executor")
    made: Executor = executors.REGISTRY.load(chosen)(**options)
    made.lease, made.grace = site.lease, site.grace
    return made


def drive(site: Site, running: Executor) -> Drive:
    """What queues runs on an executor as the site says."""
    return Drive(running, site.retries, site.backoff)
