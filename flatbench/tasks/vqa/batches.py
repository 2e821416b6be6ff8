"""Questions as examples, and batches of them that can be cut by examples whatever a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatbench.labels import IGNORED
from flatbench.tasks.base import Batch, Example
from flatbench.tasks.common.token_loss import padded
from flatbench.tasks.vqa.data import Questions
from flatbench.tasks.vqa.processor import Encoded, Encoder

#: prepared pictures are kept up to this many bytes a split
KEPT_BYTES = 2**30
#: how many rows of each of a picture's tensors are the picture's; the rest is padding
ROWS = "image_rows"


class Answers(Sequence[Example]):
    """Questions with their answers as tokens, and pictures prepared when first asked for."""

    def __init__(self, questions: Questions, encoded: Sequence[Encoded], encoder: Encoder) -> None:
        self.questions, self.encoded, self.encoder = questions, encoded, encoder
        self._cache: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: Any) -> Any:
        found = self.encoded[index]
        tokens = {"input_ids": found.input_ids, "labels": found.labels, **found.extras}
        return {**tokens, **self._pixels(int(index))}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def asked(self, index: int, target: Sequence[int] = ()) -> Example:
        """An example with another answer than its own; with none, for generation."""
        found = self.encoded[index]
        length = found.prompt_length
        tokens = {
            "input_ids": [*found.input_ids[:length], *target],
            "labels": [*[IGNORED] * length, *target],
            **{k: [*v[:length], *[0] * len(target)] for k, v in found.extras.items()},
        }
        return {**tokens, **self._pixels(index)}

    def _pixels(self, index: int) -> dict[str, Tensor]:
        picture = self.questions[index].picture
        if picture is None:
            return {}
        if index not in self._cache:
            pixels = self.encoder.pixels(self.encoder.sized(picture.open()))
            size = sum(value.numel() * value.element_size() for value in pixels.values())
            if (len(self._cache) + 1) * size > KEPT_BYTES:
                return pixels
            self._cache[index] = pixels
        return self._cache[index]


class Collator:
    """Makes batches of `Answers`, and of a batch what the model takes.

    Args:
        pad: the padding token.
        blank: tensors of some picture, which say what a picture's are called; none where nothing has one.
        extras: further inputs of the model with a number a token.
    """

    def __init__(self, pad: int, blank: Mapping[str, Tensor], extras: Iterable[str]) -> None:
        self.pad, self.blank, self.extras = pad, dict(blank), sorted(extras)

    def batch(self, examples: Sequence[Example], left: bool) -> dict[str, Tensor]:
        """Tokens, mask and labels ``(N, longest)``, the pictures' tensors ``(N, 1, …)``, and their rows.

        The second dimension is that of nothing else, so that none is taken for the text's when padding is
        cut.
        """
        ids = [e["input_ids"] for e in examples]
        batch = {
            "input_ids": padded(ids, self.pad, left),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, left),
        }
        for name in self.extras:
            rows = [e.get(name) or [0] * len(e["input_ids"]) for e in examples]
            batch[name] = padded(rows, 0, left)
        counts = []
        for name in sorted(self.blank):
            found = [e.get(name) for e in examples]
            batch[name] = _pad_and_stack(found, self.blank[name])
            counts.append([0 if value is None else len(value) for value in found])
        if counts:
            batch[ROWS] = torch.tensor(counts).T.contiguous()
        batch["labels"] = padded([e["labels"] for e in examples], IGNORED, left)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as the model takes it: the rows of all of its pictures in one tensor, without padding."""
        names = sorted(self.blank)
        inputs = {k: v for k, v in batch.items() if k not in (*names, ROWS)}
        for name, counts in zip(names, batch[ROWS].T.tolist() if names else (), strict=True):
            rows = [batch[name][i, 0, :count] for i, count in enumerate(counts) if count]
            if rows:
                inputs[name] = torch.cat(rows)
            elif not name.startswith("pixel"):  # Qwen2.5-VL finds places by these, of no picture as well
                inputs[name] = batch[name][0, 0, :0]
        return inputs


def _pad_and_stack(found: Sequence[Tensor | None], blank: Tensor) -> Tensor:
    """Tensors of several shapes as one ``(N, 1, …)``, zeros where they are shorter or there is none."""
    shapes = [value.shape for value in found if value is not None] or [blank.shape]
    shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
    stacked = blank.new_zeros((len(found), 1, *shape))
    for i, value in enumerate(found):
        if value is not None:
            corner: Any = (i, 0, *(slice(size) for size in value.shape))
            stacked[corner] = value
    return stacked
