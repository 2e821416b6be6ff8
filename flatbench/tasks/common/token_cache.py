"""Tokenised texts kept from process to process, under a name that is a hash of all they were made from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import transformers
from numpy.typing import NDArray

from flatbench.errors import FlatbenchError
from flatbench.machine.cache import folder
from flatbench.store.files import replacing

#: fewer rows are tokenised faster than a file is worth
MINIMUM = 1000
#: raised when rows are made or written differently
_FORMAT = 2
_TRUNCATION_KEY = b"truncated"

Row = Mapping[str, Any]
#: rows of numbers and of lists of numbers, and how many of them were cut
Tokenised = tuple[Sequence[Row], int]


class TokenTable(Sequence[Row]):
    """Rows whose values are integers or lists of integers, in an array a column.

    A row is made when it is asked for; lists of Python's own integers would take ten times the memory.
    """

    def __init__(self, columns: Mapping[str, tuple[NDArray[Any], NDArray[Any] | None]], count: int) -> None:
        self._columns, self._count = dict(columns), count

    @classmethod
    def of(cls, table: pa.Table) -> TokenTable:
        """The rows of an Arrow table. Raises ValueError for columns of anything but integers and lists."""
        columns: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
                # both without nulls, which nobody wrote
                columns[name] = (column.values.to_numpy(), column.offsets.to_numpy())
            elif pa.types.is_integer(column.type):
                columns[name] = (column.to_numpy(), None)
            else:
                raise ValueError(f"column {name} holds {column.type}")
        return cls(columns, table.num_rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        i = range(self._count)[index]  # negative ones as well, and an IndexError
        return {
            name: values[i].item() if offsets is None else values[offsets[i] : offsets[i + 1]].tolist()
            for name, (values, offsets) in self._columns.items()
        }

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(self._count))


def tokenised(tokenizer: Any, content: Sequence[Any], count: int, make: Callable[[], Tokenised]) -> Tokenised:
    """What ``make`` gives, or gave in an earlier process.

    Rows are kept in a Parquet file (numbers only; nothing in it can be executed) in the cache's folder
    ``tokens``. One that is missing, damaged or cannot be written costs time and nothing else. Tokenizers that
    are written in Python have no content that could be hashed, and nothing of theirs is kept.

    Args:
        content: all that the rows depend on beside the tokenizer, JSON-able: digests of texts, options.
        count: how many rows there will be; of few nothing is kept.
    """
    digest = tokenizer_digest(tokenizer)
    if digest is None or count < MINIMUM:
        return make()
    key = hashlib.sha256(json.dumps([_FORMAT, digest, *content]).encode()).hexdigest()[:32]
    path = folder() / "tokens" / f"{key}.parquet"
    with contextlib.suppress(OSError, ValueError, KeyError):  # Arrow's errors are among them
        table = pq.read_table(path)
        table.validate(full=True)
        return TokenTable.of(table), int(table.schema.metadata[_TRUNCATION_KEY])
    rows, truncated = make()
    with contextlib.suppress(OSError, FlatbenchError), replacing(path) as temporary:
        written = pa.Table.from_pylist(list(rows)).replace_schema_metadata({_TRUNCATION_KEY: str(truncated)})
        pq.write_table(written, temporary)
    return rows, truncated


@functools.lru_cache(maxsize=8)
def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hex SHA-256 of all that decides what a tokenizer makes of a text; None for one in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    for changing in ("truncation", "padding"):  # as the last call wanted it
        content.pop(changing, None)
    parts = [
        type(tokenizer).__name__,
        content,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        list(tokenizer.model_input_names),
        # which end is cut, and whether special tokens in a text are: not in the backend's description
        getattr(tokenizer, "truncation_side", None),
        getattr(tokenizer, "split_special_tokens", None),
        transformers.__version__,
        tokenizers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
