"""Data sets from the hub: which one is meant, its rows, and a line of its own for what keeps them away."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import datasets.packaged_modules
from datasets.exceptions import DatasetGenerationError

from flatbench.config import sources
from flatbench.errors import InputError, shown, suggest
from flatbench.tasks.common import columns as cells


@dataclass(frozen=True)
class Wanted:
    """What is to be had from the hub.

    Attributes:
        columns: (what a column is for, the column), in the order of the table of sources.
        instead: what to do without the hub, for messages.
    """

    name: str
    configuration: str | None
    revision: str | None
    columns: tuple[tuple[str, str], ...]
    instead: str

    def column(self, role: str) -> str:
        """The column for a purpose."""
        return dict(self.columns)[role]

    def load(self, split: str | None = None) -> Any:
        """The data set, or one split of it. Raises InputError as `load` does."""
        options = {} if split is None else {"split": split}
        return load(self.name, self.configuration, revision=self.revision, instead=self.instead, **options)


@dataclass(frozen=True)
class Source:
    """Where a task's data come from, as far as its options tell.

    Attributes:
        known: the entry of the table of sources, or that of the same data in files; None if there is none.
        wanted: what is to be had from the hub; None where files are named.
        splits: splits of the hub that are read.
        classes: names of the classes that labels are numbers of; none for other labels.
    """

    known: sources.Data | None
    wanted: Wanted | None
    splits: tuple[str, ...]
    classes: tuple[str, ...] = ()


def wanted(
    usual: sources.Data,
    data: str | None,
    revision: str | None,
    columns: Mapping[str, str] | None,
    instead: str,
    configuration: str | None = None,
) -> Wanted:
    """What a study's ``data``, ``revision`` and ``columns`` mean, given what is usual.

    Args:
        usual: the entry that a study means which says nothing.
        data: another name on the hub.
        configuration: that a repository has which is not in the table of sources.

    Raises:
        InputError: ``columns`` for a purpose that there is not.
    """
    entry = usual
    if data is not None and data != usual.name:
        known = sources.data(data, usual.configuration) or sources.data(data)
        entry = known or usual
        if known is None:
            return Wanted(data, configuration, revision, mapped(usual.columns, columns), instead)
    found = mapped(entry.columns, columns)
    return Wanted(entry.name, entry.configuration, revision or entry.revision, found, instead)


def mapped(usual: Mapping[str, str], columns: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """The usual columns with those of a study in their place. Raises InputError for an unknown purpose."""
    for role in columns or {}:
        if role not in usual:
            raise InputError(f"columns: unknown '{shown(role)}'; {suggest(role, usual)}")
    return tuple({**usual, **(columns or {})}.items())


def load(name: str, configuration: str | None, *, revision: str | None, instead: str, **options: Any) -> Any:
    """A data set, or one split of it where ``split=`` is given.

    Raises InputError that says what keeps it away, and what to do.
    """
    readers = {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}
    if name in readers:  # `datasets` would read whatever files of this kind the working directory holds
        raise InputError(f"data: {name}: not the name of a data set; give a folder or OWNER/NAME")
    try:
        return datasets.load_dataset(name, configuration, revision=revision, **options)
    except Exception as error:  # whatever datasets or the hub's client raises, offline above all
        said = " ".join(str(error).split())
        only = re.search(r"BuilderConfig .* not found. Available: \['([^']*)'\]", said)
        if only and sources.data(name, configuration) is None:
            # a copy of one of GLUE's data sets by itself: its one configuration is the one that is meant
            return load(name, only.group(1), revision=revision, instead=instead, **options)
        if isinstance(error, DatasetGenerationError):
            cause = shown(" ".join(str(error.__cause__ or error).split()), 200)
            raise InputError(
                f"data: {name}: its files are damaged, or do not fit together: {cause}; say revision: with a "
                f"commit of which they do, or {instead}"
            ) from error
        split = options.get("split")
        raise InputError(f"data: {name}: {_reason(said, revision, configuration, split, instead)}") from error


def first_rows(wanted: Wanted, split: str, count: int = 4) -> Any:
    """The first rows of a split, as a table, without the rest of it. Raises InputError as `load` does."""
    streamed = load(
        wanted.name,
        wanted.configuration,
        revision=wanted.revision,
        instead=wanted.instead,
        split=split,
        streaming=True,
    )
    try:
        rows = list(streamed.take(count))
        features = streamed.features
    except Exception as error:  # whatever the hub's client or a damaged file raises
        said = " ".join(str(error).split())
        reason = _reason(said, wanted.revision, wanted.configuration, split, wanted.instead)
        raise InputError(f"data: {wanted.name}: {reason}") from error
    if not rows:
        raise InputError(f"data: {wanted.name}: split '{split}' has no rows; {wanted.instead}")
    return datasets.Dataset.from_list(rows, features=features)


def _reason(
    said: str, revision: str | None, configuration: str | None, split: str | None, instead: str
) -> str:
    """What an error of `datasets` or the hub's client means, and the remedy."""
    if "scripts are no longer supported" in said or "trust_remote_code" in said:
        return (
            f"{revision or 'main'} holds a loading script, which is never run; say revision: "
            f"{sources.PARQUET} (the hub's own copy in Parquet), or {instead}"
        )
    if "gated" in said:
        return f"it is gated: accept its terms on the hub and log in (`hf auth login`), or {instead}"
    if "Unknown split" in said:
        there = said.partition("one of ")[2].strip(".[]").replace("'", "") or "none"
        return no_split(str(split), there, instead)
    if "BuilderConfig" in said:
        there = said.partition("Available: ")[2].strip("[]").replace("'", "")
        return f"no configuration '{configuration}'; it has {shown(there, 200)}; name another, or {instead}"
    if "Revision" in said and "doesn't exist" in said:
        return f"no revision '{revision}' on the hub; leave it out for the one that was checked, or {instead}"
    if "doesn't exist on the Hub" in said:
        return f"not on the hub, or it is private: check the name and log in (`hf auth login`), or {instead}"
    return (
        f"neither a local folder nor to be had from the hub: {shown(said, 300)}; with no network, {instead}"
    )


def no_split(split: str, there: str, instead: str) -> str:
    """What is wrong where a data set has other splits, and the remedy."""
    return (
        f"no split '{split}'; it has {shown(there, 200)}; the split was renamed, or it is another data set: "
        f"say revision: with a commit that has it, or {instead}"
    )


def require_columns(table: Any, wanted: Wanted, split: str, optional: Sequence[str] = ()) -> None:
    """Raise InputError, with the remedy, for a column that a split lacks."""
    for role, column in wanted.columns:
        if column not in table.column_names and role not in optional:
            there = shown(", ".join(table.column_names), 300)
            raise InputError(
                f"data: {wanted.name} ({split}): no column '{column}' for {role}; it has {there}; say "
                f"which it is, as columns: {{{role}: {table.column_names[0]}}}"
            )


def class_numbers(table: Any, wanted: Wanted, split: str, classes: Sequence[str]) -> list[int]:
    """The label of every row as a number, -1 for none.

    Classes that the table names are told by their names where these are ``classes``, in whatever order.
    Numbers without such names count ``classes`` in their order.

    Raises InputError for texts that are not ``classes``, and for what is neither text nor whole number.
    """
    column = wanted.column("label")
    values, named = table[column][:], getattr(table.features[column], "names", None)
    where = f"data: {wanted.name} ({split}): column '{column}'"
    own = {name.casefold(): number for number, name in enumerate(classes)}
    order: dict[Any, int] = {}
    if named is not None and {name.casefold() for name in named} == set(own):
        order = {number: own[name.casefold()] for number, name in enumerate(named)}
    found = []
    for number, value in enumerate(values):
        if isinstance(value, str) and value.casefold() in own:
            found.append(own[value.casefold()])
        elif isinstance(value, str):
            raise InputError(
                f"{where} holds texts, as '{shown(value, 50)}', and not the classes {', '.join(classes)} or "
                "their numbers; name the column of these, as columns: {label: …}"
            )
        elif cells.missing(value):
            found.append(-1)
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{where}, row {number}: {shown(str(value), 50)} is no class")
        else:
            found.append(order.get(value, value))
    return found
