"""Define the samples of a benchmark, and read its files."""

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.images import decode, read
from mm1.errors import Unreadable, UserError

if TYPE_CHECKING:
    from PIL import Image

Key = int | str


@dataclass(frozen=True)
class Embedded:
    """Name the place of an image in a parquet file."""

    file: Path
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}: {self.column} of row {self.row}"


Picture = Path | Embedded


@dataclass(frozen=True)
class Sample:
    """Hold one question of a benchmark.

    key: its name in submissions. image: the first image; None without images. question: `<image>` marks the place of an
    image; images without a mark come before the text, and a mark without an image is text. references: captions, the
    answers of ten people, or the letter of the right option; empty in test splits. options: of a multiple choice.
    groups: parts of the benchmark whose scores include it. others: the images after the first.
    """

    key: Key
    image: Picture | None
    question: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    others: tuple[Picture, ...] = ()

    @property
    def images(self) -> tuple[Picture, ...]:
        """Return all images."""
        return (self.image, *self.others) if self.image else ()


def picture(where: Picture) -> "Image.Image":
    """Read the image at a path or in a parquet file. Raises UserError."""
    if isinstance(where, Path):
        return read(where)
    try:
        return decode(_column(where.file, where.column)[where.row].as_py()["bytes"])
    except Unreadable as error:
        raise UserError(f"{where}: {error.reason}") from None


@lru_cache(8)
def _column(file: Path, column: str) -> Any:
    from pyarrow import parquet

    return parquet.read_table(file, columns=[column])[column]


class Images:
    """Index the files below a folder by their names. Raises UserError if there is no such folder."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"no folder of images {folder}")
        self.folder = folder
        self.paths: dict[str, Path] = {}
        for parent, _, names in os.walk(folder):
            self.paths.update((name, Path(parent, name)) for name in names)

    def find(self, *names: str) -> Path:
        """Return the path of the first of these names that exists below the folder, in full or by its last part.

        If none exists, return the path that the first one would have.
        """
        for name in names:
            if "/" in name and (path := self.folder / name).is_file():
                return path
            if path := self.paths.get(name.rpartition("/")[2]):
                return path
        return self.folder / names[0]

    def at(self, name: str) -> Path:
        """Return the path of a name below the subfolder `images`, or else below the folder, not by its last part."""
        path = self.folder / "images" / name
        return path if path.is_file() else self.folder / name

    def of_coco(self, image_id: Key, subset: str = "") -> Path:
        """Return the file of a COCO image. subset: such as "val2014", part of the names until 2015."""
        if isinstance(image_id, str):
            return self.find(image_id, f"{image_id}.jpg")
        number = f"{image_id:012d}.jpg"
        subsets = [subset] if subset else []
        return self.find(*(f"COCO_{s}_{number}" for s in (*subsets, "val2014", "train2014", "test2015")), number)


@dataclass(frozen=True)
class Form:
    """Define a file format. read: returns the samples of a split; fits: returns whether files have this format."""

    read: "Callable[[Loaded, Images, str], list[Sample]]"
    fits: "Callable[[Loaded], bool]"


def rows_at(key: str | None, column: str = "") -> "Callable[[Loaded], bool]":
    """Return a function that tests whether one of the files has a list of rows at this key (None: is such a list).

    column: a field that the first row must have.
    """

    def fits(loaded: Loaded) -> bool:
        for _, data in loaded:
            rows = data if key is None else data.get(key) if isinstance(data, dict) else None
            if isinstance(rows, list) and rows and isinstance(rows[0], dict) and column in {*rows[0], ""}:
                return all(isinstance(other, type(data)) for _, other in loaded)
        return False

    return fits


def expect_match(file: Path, name: str, ids: Collection[Key], other: str, other_ids: Collection[Key]) -> None:
    """Raise UserError if both sides have ids but none in common; a partial match passes.

    name, other: names of the two sides in the error.
    """
    if ids and other_ids and not set(ids) & set(other_ids):
        example, other_example = (json.dumps(next(iter(keys))) for keys in (ids, other_ids))
        raise UserError(
            f"{file}: 0 of {len(ids)} {name} match the {len(other_ids)} {other}: "
            f"ids such as {example} against {other_example}"
        )


Loaded = list[tuple[Path, Any]]


def load(file: Path) -> Any:
    """Return the content of a JSON file, or the rows of a parquet file. Raises UserError."""
    if file.suffix == ".parquet":
        return _parquet(file)
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def field(file: Path, row: Any, name: str, kind: type | tuple[type, ...], key: object = None) -> Any:
    """Return a row's value of this name, of one of these types; true and false do not count as numbers.

    Raises UserError that names the file and the row's key.
    """
    value = row.get(name) if isinstance(row, dict) else None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        where = f"{file}: " + ("" if key is None else f"{key}: ")
        expected = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{where}{name} is {json.dumps(value, default=str)[:60]}, expected {expected}")
    return value


def optional(file: Path, row: Any, name: str, kind: type | tuple[type, ...], key: object = None) -> Any:
    """Return a row's value as `field` does, or None if it is missing or null."""
    return None if isinstance(row, dict) and row.get(name) is None else field(file, row, name, kind, key)


def _parquet(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file, each image as an Embedded."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: {error}") from None
    columns = {}
    for name, column in zip(table.column_names, table.columns):
        if pyarrow.types.is_struct(column.type):
            valid = column.flatten()[column.type.get_field_index("bytes")].is_valid().to_pylist()
            columns[name] = [Embedded(file, row, name) if is_valid else None for row, is_valid in enumerate(valid)]
        else:
            columns[name] = column.to_pylist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]
