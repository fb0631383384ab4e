"""Read shards: files of records with random access, each indexed once.

Open descriptors, unpacked .gz files and parquet row groups are cached in the process, not in the shard, so that a shard
can be pickled. A .gz is unpacked to memory and a .json is parsed as a whole: suitable for small sets only.
"""

import array
import io
import json
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mm1.engine.data.tar import File
from mm1.errors import Unreadable, UserError

if TYPE_CHECKING:
    from mm1.engine.data.samples import MemberCounts

PARQUET_ROWS = 16  # rows of a batch of a row group that is too large to be read at once


class Shard:
    """Hold the records of one file. A subclass indexes the file once, and reads any item by its row.

    count: number of records. damage: a description of broken parts of the file. ignored: members that no record
    contains.
    """

    count: int
    damage: str | None = None
    ignored: "MemberCounts | None" = None

    def __init__(self, file: File):
        self.file = file

    @property
    def size(self) -> int:
        """Return the bytes of the file."""
        return os.path.getsize(self.file.path)

    def key(self, row: int) -> str:
        """Return a name of a record inside the file."""
        return str(row)

    def item(self, row: int) -> Any:
        """Return a record in the form of the file. Raises Unreadable."""
        raise NotImplementedError


class LinesShard(Shard):
    """Read documents of one line each, without blank lines; a line is parsed when it is read."""

    def __init__(self, file: File, parse: Callable[[bytes], Any]):
        super().__init__(file)
        self.parse = parse
        data, self.damage = file.whole()
        places, start = array.array("q"), 0
        lines = io.BytesIO(data) if isinstance(data, bytes) else data
        for number, line in enumerate(iter(lines.readline, b""), 1):
            if line.strip():
                places.extend((start, len(line), number))
            start += len(line)
        self.lines = np.array(places, np.int64).reshape(-1, 3)
        self.count = len(self.lines)

    def key(self, row: int) -> str:
        """Return the number of the line."""
        return str(self.lines[row, 2])

    def item(self, row: int) -> Any:
        """Return the parsed line."""
        start, size, _ = self.lines[row].tolist()
        return self.parse(self.file.read(start, size).rstrip(b"\r\n"))


class JsonShard(Shard):
    """Read a JSON file with a list of documents, or with a single one."""

    def __init__(self, file: File):
        super().__init__(file)
        try:
            self.count = len(_documents(file))
        except Unreadable as error:
            self.count, self.damage = 0, error.reason

    def item(self, row: int) -> Any:
        """Return a document of the list."""
        return _documents(self.file)[row]


class ParquetShard(Shard):
    """Read documents of one row each. Whole row groups are read and cached: shuffling is faster with small ones.

    columns: must exist. optional: are read if they exist.
    """

    def __init__(self, file: File, columns: tuple[str, ...], optional: tuple[str, ...] = ()):
        super().__init__(file)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError("reading parquet needs pyarrow: pip install pyarrow") from None
        try:
            parquet = pq.ParquetFile(file.path)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{file.path} is not a parquet file: {str(error).splitlines()[0]}") from None
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            raise UserError(f"{file.path} has no column {missing[0]!r}")
        self.columns = (*columns, *(name for name in optional if name in parquet.schema_arrow.names))
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        self.ends, self.count = np.cumsum(sizes), sum(sizes)

    def item(self, row: int) -> Any:
        """Return a row as a dict of its columns."""
        import pyarrow as pa

        group, inside = locate(self.ends, row)
        try:
            rows = _row_group(self.file, group, self.columns)
            if rows is None:
                part, inside = divmod(inside, PARQUET_ROWS)
                rows = _parts_of_group(self.file, group, self.columns)[part]
            return rows.slice(inside, 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Unreadable(f"parquet: {error}") from None


@lru_cache(maxsize=4)
def _row_group(file: File, group: int, columns: tuple[str, ...]) -> Any:
    """Return a group's rows as a table; None if they take more than 2 GiB, the limit of Arrow's nested columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file.path).read_row_group(group, columns=list(columns), use_threads=False)
    except pa.ArrowNotImplementedError:
        return None


@lru_cache(maxsize=1)
def _parts_of_group(file: File, group: int, columns: tuple[str, ...]) -> list[Any]:
    """Return a large group's rows in batches of PARQUET_ROWS. Only one group is cached, because of its size."""
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(file.path).iter_batches(
        PARQUET_ROWS, row_groups=[group], columns=list(columns), use_threads=False
    )
    return list(batches)


@lru_cache(maxsize=64)
def _documents(file: File) -> list[Any]:
    value = parse_json(file.read(0, os.path.getsize(file.path)))
    return value if isinstance(value, list) else [value]


def locate(ends: np.ndarray, position: int) -> tuple[int, int]:
    """Return the number of the part that contains a position, and the position inside it. ends: of the parts."""
    which = int(np.searchsorted(ends, position, side="right"))
    return which, position - (int(ends[which - 1]) if which else 0)


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark. Raises Unreadable."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("text is not UTF-8") from None


def parse_json(data: bytes) -> Any:
    """Parse a JSON value. Raises Unreadable."""
    text = decode_utf8(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"malformed JSON: {error}") from None
