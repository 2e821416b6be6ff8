"""ScienceQA and VizWiz as questions with pictures: the published files, or the same rows from the hub."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from flatbench.config import sources
from flatbench.config.words import folded
from flatbench.errors import InputError, shown
from flatbench.security import paths
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import find, folder_of, json_lines, read_json
from flatbench.tasks.vqa.images import FilePicture, Picture, TablePicture, ZipPicture, members

Name = Literal["scienceqa", "vizwiz"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: traits of ScienceQA's problems that its official figures are divided by
TRAITS = ("subject", "grade")
HUB = {"scienceqa": "derek-thomas/ScienceQA"}
#: what columns, or entries of a problem, are for
ROLES: dict[str, Mapping[str, str]] = {
    "scienceqa": {name: name for name in ("question", "choices", "answer", "hint", "image")},
    "vizwiz": {name: name for name in ("question", "answers", "image")},
}
#: what splits are called in files and on the hub
SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right.

    Attributes:
        key: its name in the files, for messages.
        context: text that goes before the question (ScienceQA's hint), or "".
        choices: answers to choose from, or none where any text may be given.
        answer: the text to learn: the letter of a choice, or the answer that most people gave.
        references: every right answer: that letter, or what each of ten people answered.
        picture: None for a question about its text alone.
        traits: what figures are divided by: ``subject`` and ``grade`` where the files say them,
            ``answerable`` (0 or 1), ``context`` (whether there is one).
    """

    key: str
    text: str
    answer: str
    references: tuple[str, ...]
    context: str = ""
    choices: tuple[str, ...] = ()
    picture: Picture | None = None
    traits: Mapping[str, Any] = field(default_factory=dict)

    def cut(self, text: str, context: str) -> Question:
        """The same question with less text; what figures are divided by stays."""
        return dataclasses.replace(self, text=text, context=context)


Questions = Sequence[Question]
Renamer = Callable[[Mapping[str, Any]], dict[str, Any]]


def _renamer(called: Mapping[str, str]) -> Renamer:
    """Calls entries by what they are for; ``called`` says how they are called."""
    others = {name: role for role, name in called.items() if name != role}
    return lambda row: {**row, **{role: row[name] for name, role in others.items() if name in row}}


def digest(questions: Questions) -> str:
    """Hex SHA-256 of texts, answers and pictures."""
    found = hashlib.sha256()
    for q in questions:
        picture = None if q.picture is None else q.picture.digest()
        row = (q.text, q.context, q.choices, q.answer, q.references, picture, sorted(q.traits.items()))
        found.update(repr(row).encode())
    return found.hexdigest()


def content(q: Question) -> tuple[Any, ...]:
    """What is asked, of which picture: the same in two equal questions."""
    return *map(folded, (q.text, q.context, *q.choices)), None if q.picture is None else q.picture.digest()


def read(
    name: Name, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> dict[str, Questions]:
    """The published splits of a data set that have answers.

    ScienceQA has ``train``, ``validation`` and ``test``. The answers of VizWiz's test questions are not
    public: its published validation questions are ``test`` here, and there is no ``validation``.

    Args:
        data: a folder of the published files (or one with a folder ``scienceqa`` or ``vizwiz`` of them); a
            name on the hub; the usual one there if None.
        columns: what a column, or an entry of a problem, is for -> what it is called.

    Raises:
        InputError: nothing is there, or a file is not as published; the message names file, row and field.
    """
    folder = folder_of(data)
    if folder is not None:
        inside = folder / name
        renamed = _renamer(dict(from_hub.mapped(ROLES[name], columns)))
        found = _READERS[name](inside if inside.is_dir() else folder, renamed)
    else:
        wanted = source(name, data, revision, columns).wanted
        assert wanted is not None
        found = _from_hub(name, wanted)
    for split in ("train", "test"):
        if not found.get(split):
            raise InputError(f"data: {data or name}: there are no {split} questions")
    return found


# -- ScienceQA --------------------------------------------------------------------------------------------


def read_scienceqa(folder: Path, renamed: Renamer = dict) -> dict[str, Questions]:
    """ScienceQA in a folder: the official layout, or JSON lines with a zip archive.

    The official layout is ``problems.json`` with ``images/SPLIT/PID/image.png`` (or ``SPLIT/PID/image.png``).
    The other, which is taken where both are there, is ``problems….jsonl`` (or .gz), a problem with its
    ``pid`` a line, and ``images.zip`` or a folder ``images`` with the files that the lines name.
    """
    lines = sorted([*folder.glob("problems*.jsonl"), *folder.glob("problems*.jsonl.gz")])
    if lines:
        picture = _lines_picture(folder)
        return _by_split(_problem(renamed(row), str(lines[0]), picture) for _, row in json_lines(lines[0]))
    path = find(folder, ["problems.json"])
    if path is None:
        raise InputError(f"data: no problems.json and no problems*.jsonl in {folder}")
    problems = read_json(path)
    if not isinstance(problems, dict) or not all(isinstance(p, dict) for p in problems.values()):
        raise InputError(f"{path}: expected an object with a problem by number")
    rows = ({**renamed(problem), "pid": pid} for pid, problem in problems.items())
    return _by_split(_problem(row, str(path), _official_picture(folder)) for row in rows)


def _problem(
    row: Mapping[str, Any], where: str, picture: Callable[[Mapping[str, Any], str], Picture | None]
) -> tuple[str, Question]:
    """Split and question of one row. Raises InputError naming the problem and what is wrong with it."""
    at = f"{where}, problem {shown(row.get('pid'))}"
    for name in ("question", "choices", "answer", "split"):
        if row.get(name) is None or row[name] in ("", []):
            raise InputError(f"{at}: no '{name}'")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise InputError(f"{at}: 'choices' is not a list of texts")
    if len(choices) > len(LETTERS):
        raise InputError(f"{at}: {len(choices)} choices, but only {len(LETTERS)} letters")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"{at}: answer {shown(repr(answer))} is not one of its {len(choices)} choices (0 to "
                         f"{len(choices) - 1})")  # fmt: skip
    for name in ("question", "hint", *TRAITS):
        if not isinstance(row.get(name) or "", str):
            raise InputError(f"{at}: '{name}' is no text")
    traits = {name: row[name] for name in TRAITS if row.get(name)}
    hint = row.get("hint") or ""
    letter = LETTERS[answer]
    return _split_name(row["split"], at), Question(
        key=str(row.get("pid")),
        text=str(row["question"]),
        context=hint,
        choices=tuple(choices),
        answer=letter,
        references=(letter,),
        picture=picture(row, at),
        traits={**traits, "context": bool(hint)},
    )


def _split_name(name: Any, at: str) -> str:
    for split, names in SPLITS.items():
        if name in names:
            return split
    raise InputError(f"{at}: unknown split {shown(repr(name))}")


def _by_split(problems: Iterable[tuple[str, Question]]) -> dict[str, Questions]:
    found: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for split, question in problems:
        found[split].append(question)
    return {split: tuple(questions) for split, questions in found.items()}


def _official_picture(folder: Path) -> Callable[[Mapping[str, Any], str], Picture | None]:
    def find(row: Mapping[str, Any], at: str) -> Picture | None:
        if not row.get("image"):
            return None
        inside = f"{row['split']}/{row['pid']}/{row['image']}"
        return _file(at, paths.inside(folder / "images", inside, at), paths.inside(folder, inside, at))

    return find


def _lines_picture(folder: Path) -> Callable[[Mapping[str, Any], str], Picture | None]:
    archive = folder / "images.zip"
    known = members(archive) if archive.is_file() else None

    def find(row: Mapping[str, Any], at: str) -> Picture | None:
        image = row.get("image")
        if not image:
            return None
        if known is None:
            return _file(at, paths.inside(folder / "images", str(image), at))
        if str(image) not in known:
            raise InputError(f"{at}: its image {shown(str(image), 100)} is not in {archive}")
        return ZipPicture(archive, str(image))

    return find


def _file(at: str, *places: Path) -> Picture:
    for path in places:
        if path.is_file():
            return FilePicture(path)
    raise InputError(f"{at}: its image is missing: {places[0]}")


# -- VizWiz -----------------------------------------------------------------------------------------------


def read_vizwiz(folder: Path, renamed: Renamer = dict) -> dict[str, Questions]:
    """VizWiz in a folder of the published annotations and images.

    Annotations are ``train.json`` and ``val.json`` (or names that end so, as ``VizWiz_VQA_v2_val.json``;
    plain or gzipped; in the folder itself or in ``Annotations``), images the files they name in ``train`` and
    ``val``, or in ``images/train`` and ``images/val``, or in ``images``.
    """
    found: dict[str, Questions] = {}
    for split, part in (("train", "train"), ("val", "test")):
        path = _annotations(folder, split)
        pictures = [folder / split, folder / "images" / split, folder / "images"]
        found[part] = read_annotations(path, _photograph(pictures), renamed)
    return found


def _photograph(folders: Sequence[Path]) -> Callable[[str, str], Picture]:
    return lambda name, at: _file(at, *(paths.inside(folder, name, at) for folder in folders))


def _annotations(folder: Path, split: str) -> Path:
    for place in (folder, folder / "Annotations", folder / "annotations"):
        for pattern in (f"{split}.json", f"*_{split}.json"):
            found = sorted([*place.glob(pattern), *place.glob(f"{pattern}.gz")])
            if found:
                return found[0]
    raise InputError(f"data: no {split}.json (or …_{split}.json, or the same with .gz) in {folder}")


def read_annotations(
    path: Path,
    picture: Callable[[str, str], Picture | None] = lambda name, at: None,
    renamed: Renamer = dict,
) -> Questions:
    """The questions of one of VizWiz's annotation files.

    Args:
        picture: (file name, place for messages) -> the image; questions have none unless it is given.
        renamed: (question as the file has it) -> with its entries called as VizWiz calls them.

    Raises:
        InputError: not the published layout; the message names row and field.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: expected a list of questions")
    found = []
    for number, row in enumerate(rows, start=1):
        at = f"{path}, question {number}"
        if not isinstance(row, dict):
            raise InputError(f"{at}: expected an object with named values")
        found.append(_visual_question(renamed(row), at, lambda row, at: picture(str(row["image"]), at)))
    return tuple(found)


def _visual_question(
    row: Mapping[str, Any], at: str, picture: Callable[[Mapping[str, Any], str], Picture | None]
) -> Question:
    for name in ("image", "question", "answers"):
        if row.get(name) is None or row[name] in ("", []):
            raise InputError(f"{at}: no '{name}'")
    given = row["answers"] if isinstance(row["answers"], list) else []
    answers: tuple[Any, ...] = tuple(a.get("answer") if isinstance(a, dict) else a for a in given)
    if not all(isinstance(answer, str) for answer in answers) or not any(answers):
        raise InputError(f"{at}: 'answers' holds no text")
    if not isinstance(row["question"], str):
        raise InputError(f"{at}: 'question' is no text")
    answerable = row.get("answerable")
    if answerable not in (None, 0, 1):
        raise InputError(f"{at}: 'answerable' is {shown(repr(answerable))}, and neither 0 nor 1")
    return Question(
        key=str(row["image"]) if isinstance(row["image"], str) else at,
        text=row["question"],
        answer=Counter(filter(None, answers)).most_common(1)[0][0],  # some people said nothing
        references=answers,
        picture=picture(row, at),
        traits={} if answerable is None else {"answerable": int(answerable)},
    )


# -- the hub ----------------------------------------------------------------------------------------------


def source(
    name: Name, data: str | None, revision: str | None, columns: Mapping[str, str] | None = None
) -> from_hub.Source:
    """Where a data set comes from; arguments as of `read`. Raises InputError for unusable ones."""
    usual = sources.data(HUB[name]) if name in HUB else sources.FILES[name]
    assert usual is not None
    if folder_of(data) is not None:
        return from_hub.Source(usual, None, ())
    hub = data or HUB.get(name)
    if hub is None:
        raise InputError(
            f"data: {name}: no data set of the hub is known that has its training answers; give the folder "
            "of the published annotations and images"
        )
    wanted = from_hub.wanted(usual, hub, revision, columns, "give a folder of the published files")
    splits = ("train", "validation") if name == "vizwiz" else ("train", "validation", "test")
    return from_hub.Source(sources.data(wanted.name), wanted, splits)


@functools.lru_cache(maxsize=4)
def _from_hub(name: Name, wanted: from_hub.Wanted) -> dict[str, Questions]:
    loaded: Any = wanted.load()
    named = {part: next((n for n in names if n in loaded), None) for part, names in SPLITS.items()}
    if name == "vizwiz":  # answers of the test questions are not public
        named = {"train": named["train"], "test": named["validation"]}
    found: dict[str, Questions] = {}
    for part, split in named.items():
        if split is None:
            lacking = from_hub.no_split(part, ", ".join(loaded), wanted.instead)
            raise InputError(f"data: {wanted.name}: {lacking}")
        from_hub.require_columns(loaded[split], wanted, split, optional=("hint",))
        found[part] = tuple(_rows(name, loaded[split], wanted, split, part))
    return found


def _rows(name: Name, table: Any, wanted: from_hub.Wanted, split: str, part: str) -> Iterator[Question]:
    """Questions of a split; images stay encoded until they are asked for."""
    where, image = f"{wanted.name} ({split})", wanted.column("image")
    if not isinstance(table.features[image], datasets.Image):
        raise InputError(
            f"data: {where}: column '{image}' holds no images; say which does, as columns: {{image: …}}"
        )
    table = table.cast_column(image, datasets.Image(decode=False))
    renamed = _renamer(dict(wanted.columns))

    def picture(row: Mapping[str, Any], at: str) -> Picture | None:
        return TablePicture(table, row["pid"], image, where) if row["image"] else None

    for number, row in enumerate(table):
        row = {**renamed(row), "pid": number, "split": part}
        if name == "scienceqa":
            yield _problem(row, where, picture)[1]
        else:
            yield _visual_question(row, f"{where}, row {number}", picture)


_READERS: dict[str, Callable[[Path, Renamer], dict[str, Questions]]] = {
    "scienceqa": read_scienceqa,
    "vizwiz": read_vizwiz,
}
