"""Writes the texts that trec-minilm, sst-minilm and sst5-minilm are about, divided once, as CSV files.

    python studies/text_files.py trec DATA local/trec
    python studies/text_files.py sst2 DATA local/sst2
    python studies/text_files.py sst5 DATA local/sst5

DATA is the folder of the published files (TREC's .label files; GLUE's TSV layout for SST-2; train.csv and
test.csv of ``label,sentence`` for SST-5), or OWNER/NAME on the hub. FOLDER gets ``train.csv``,
``validation.csv`` and ``test.csv`` with the columns ``text`` and ``label``. The published test set (of SST-2
the development set) is too small to see a difference of one point; so ``test.csv`` holds it and, beside it,
training examples that are in neither of the other two files. Texts that occur twice, upper and lower case
apart, are kept once, those of the published test set first, so that no text is in two files. The same data
give the same files.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flatbench.tasks.common.splitting import stratified
from flatbench.tasks.text import prompt_data
from flatbench.tasks.text.sequence_classification import Rows

SEED = 0
#: data set -> how many training examples `test.csv` has beside the published test set; None for the rest
HELD_OUT = {"trec": None, "sst2": 5000, "sst5": 2800}


def divided(files: Mapping[str, Rows], train: int, validation: int, held_out: int | None) -> dict[str, Rows]:
    """``train``, ``validation`` and ``test``, stratified by label.

    Args:
        files: the published ``train`` and ``test``.
        train, validation: sizes of the two.
        held_out: how many further training examples are tested on; all that are left if None.

    Raises:
        InputError: more is asked for than there is.
    """
    seen: set[tuple[str, ...]] = set()
    published = files["test"].take(_new(files["test"], seen))
    pool = files["train"].take(_new(files["train"], seen))
    rest, chosen = np.arange(len(pool)), {}
    for name, size in (("train", train), ("validation", validation), ("test", held_out)):
        strata = [int(label) for label in pool.labels]
        chosen[name], rest = stratified(rest, size, strata, SEED, name)
    found = {name: pool.take(indices.tolist()) for name, indices in chosen.items()}
    test = found["test"]
    return {**found, "test": Rows((*published.texts, *test.texts), (*published.labels, *test.labels))}


def _new(rows: Rows, seen: set[tuple[str, ...]]) -> list[int]:
    """The rows whose texts are not in ``seen``, which takes them in."""
    found = []
    for number, texts in enumerate(rows.texts):
        key = tuple(" ".join(text.lower().split()) for text in texts)
        if key not in seen:
            seen.add(key)
            found.append(number)
    return found


def write(rows: Rows, labels: Sequence[str], path: Path) -> None:
    """One file with the columns ``text`` and ``label``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for (text,), label in zip(rows.texts, rows.labels, strict=True):
            writer.writerow([text, labels[int(label)]])


def main() -> None:
    """Read, divide, write. Raises InputError for data that cannot be read or are too few."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(HELD_OUT))
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training examples (1000)")
    parser.add_argument("--validation", type=int, default=1000, help="validation examples (1000)")
    chosen = parser.parse_args()
    files = prompt_data.read(chosen.kind, chosen.data, None)
    parts = divided(files, chosen.train, chosen.validation, HELD_OUT[chosen.kind])
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write(rows, prompt_data.DATA[chosen.kind].labels, chosen.folder / f"{name}.csv")
        print(f"{chosen.folder / name}.csv: {len(rows)} texts")


if __name__ == "__main__":
    main()
