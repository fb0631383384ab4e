"""Index the samples of a WebDataset tar: which members belong together, and which belong to no sample.

Members whose names differ only in the extension are one sample. The extension begins at the first dot of the file name,
as in WebDataset. If mm1 does not read that extension, it begins at the last dot: "photo.v1.png" is the image of
"photo.v1". Such a sample without image or caption is a further member of the sample "photo" if that exists
("photo.mask.png"). Of several images before a caption the first is used; a member after a complete sample of its name
begins another sample.
"""

import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from mm1.engine.data.shards import Shard, decode_utf8, parse_json
from mm1.engine.data.tar import FOLDER, File, Member, members
from mm1.errors import Unreadable

IMAGES = (
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif",
)  # fmt: skip
CAPTIONS = ("caption", "captions", "text")  # fields of a sample's .json: a text, or a list of texts
KEY, IMAGE, TEXT, META, NOTE, WIDTH = 0, 2, 4, 6, 8, 9  # columns of a row; the first four are start and size
COLUMNS = {**dict.fromkeys(IMAGES, IMAGE), "txt": TEXT, "json": META}
KINDS, EXTENSIONS = 8, 3  # maximum numbers of kinds of members, and of extensions of further members, in a message
NONE, SPARSE = -1, -2  # a start: no member; a size: the start is that of the header of a sparse member


class MemberCounts:
    """Count members of tars by kind, and store the name of the first of each kind."""

    def __init__(self):
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Add `count` members of a kind, of which `name` is the first."""
        before, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = before + count, first

    def __str__(self) -> str:
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1][0])
        words = [f"{count} × {kind} (first: {name})" for kind, (count, name) in kinds[:KINDS]]
        if others := kinds[KINDS:]:
            words.append(f"{sum(count for _, (count, _) in others)} members of {len(others)} further kinds")
        return ", ".join(words)


class TarShard(Shard):
    """Read the samples of one tar: an image, and its caption from .txt or else from .json. A sample takes 72 bytes.

    damage: broken parts of the tar, and members that should belong to a sample. ignored: folders, names that begin with
    a dot, and further members of samples.
    """

    columns: ClassVar[Mapping[str, int]] = COLUMNS  # extension -> its column of a row
    other = "caption"  # what a sample has besides its image

    def __init__(self, file: File):
        super().__init__(file)
        self.ignored, self.notes = MemberCounts(), [""]
        damage: list[str] = []
        lost = MemberCounts()
        index = _Index(members(file, damage), self.columns, lost, self.ignored)
        rows = np.array(index.rows, np.int64).reshape(-1, WIDTH)
        whole = self._whole(rows)
        keep = np.ones(len(rows), bool)
        for key, row in index.repeated:
            if not whole[row]:
                keep[row] = False
                lost.add("an image or caption after a complete sample of the same name", key)
        for key, (shorter, extension) in index.dotted.items():
            row = index.row_of[key]
            if keep[row] and not whole[row] and shorter in index.row_of:
                keep[row] = False
                index.unread.append((shorter, extension, "", shorter + extension))
        further = defaultdict[int, list[str]](list)
        for key, extension, kind, name in index.unread:
            row, last = index.row_of.get(key), extension.rpartition(".")[2]
            if row is not None:
                further[row].append(f"{extension} ({kind})" if kind else extension)
            if not kind:  # links and devices are counted already
                counts, where = (lost, "in no sample") if row is None else (self.ignored, "in addition to a sample")
                counts.add(f".{last} {where}", name)
        numbers: dict[str, int] = {}
        for row, extensions in further.items():
            rest = len(extensions) - EXTENSIONS
            note = ", ".join(extensions[:EXTENSIONS]) + (f" and {rest} more" if rest > 0 else "")
            rows[row, NOTE] = numbers.setdefault(note, 1 + len(numbers))
        self.notes += numbers
        self.keys, self.rows, self.count = bytes(index.keys), rows[keep], int(keep.sum())
        self.damage = "; ".join([*damage, *([f"skipped: {lost}"] if lost.kinds else [])])

    def key(self, row: int) -> str:
        """Return the name of a sample's members without the extension."""
        start, size = self.rows[row, KEY : KEY + 2].tolist()
        return self.keys[start : start + size].decode()

    def item(self, row: int) -> tuple[bytes, Any]:
        """Return the bytes of the image, and the caption or a list of several, as the file has it."""
        image, note = self._image(row), self._note(row)
        if (text := self._content(row, TEXT)) is not None:
            return image, decode_utf8(text)
        if (meta := self._content(row, META)) is not None and isinstance(fields := parse_json(meta), dict):
            for name in CAPTIONS:
                if (caption := fields.get(name)) is not None:
                    return image, caption
        further = f", found {note}" if note else ""
        raise Unreadable(f'image without a caption: expected a .txt or .json ("caption") of the same name{further}')

    def _whole(self, rows: np.ndarray) -> np.ndarray:
        """Return for each row whether the sample is complete."""
        return (rows[:, IMAGE] != NONE) & (rows[:, [TEXT, META]] != NONE).any(1)

    def _note(self, row: int) -> str:
        """Return the extensions of further members of a sample."""
        return self.notes[self.rows[row, NOTE]]

    def _image(self, row: int) -> bytes:
        """Return the bytes of the image. Raises Unreadable."""
        if (image := self._content(row, IMAGE)) is not None:
            return image
        note, endings = self._note(row), ", ".join(f".{ending}" for ending in IMAGES)
        raise Unreadable(
            f"{note} is not read as an image, expected {endings}" if note else f"{self.other} without an image"
        )

    def _content(self, row: int, column: int) -> bytes | None:
        """Return the bytes of a member of a sample, None if the sample has none."""
        start, size = self.rows[row, column : column + 2].tolist()
        if start == NONE:
            return None
        return Member("", start, size, start, sparse=size == SPARSE).read(self.file)


class ImageTarShard(TarShard):
    """Read the images of one tar, each with the class in a .cls of the same name, if there is one."""

    columns: ClassVar[Mapping[str, int]] = dict.fromkeys(IMAGES, IMAGE) | {"cls": TEXT}
    other = "class"

    def item(self, row: int) -> tuple[bytes, str | None]:
        """Return the bytes of the image, and its class."""
        image, label = self._image(row), self._content(row, TEXT)
        return image, None if label is None else decode_utf8(label).strip()

    def _whole(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, IMAGE] != NONE


class _Index:
    """Collect rows of samples in one pass over a tar, and the members that can only be assigned after it."""

    def __init__(self, tar: Iterable[Member], columns: Mapping[str, int], lost: MemberCounts, ignored: MemberCounts):
        self.keys, self.rows, self.row_of = bytearray(), array.array("q"), dict[str, int]()
        self.repeated = list[tuple[str, int]]()  # keys and rows of samples whose key has an earlier row
        self.dotted = dict[str, tuple[str, str]]()  # key with a dot -> the key before the dot, the extension after it
        self.unread = list[tuple[str, str, str, str]]()  # key, extension, kind and name of further members
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            if member.kind == FOLDER or base.startswith("."):
                ignored.add(member.kind or "a name that begins with a dot", member.name)
                continue
            stem, _, extension = base.partition(".")
            key, column = folder + slash + stem, columns.get(extension.lower())
            if member.kind:
                lost.add(member.kind, member.name)
                self.unread.append((key, f".{extension}", member.kind, member.name))
                continue
            if column is None:
                shorter, (stem, _, last) = key, base.rpartition(".")
                column = columns.get(last.lower())
                if column is None or not stem:
                    self.unread.append((key, f".{extension}", "", member.name))
                    continue
                key = folder + slash + stem
                self.dotted[key] = shorter, f".{extension}"
            self._add(member, key, column, lost)

    def _add(self, member: Member, key: str, column: int, lost: MemberCounts) -> None:
        row = self.row_of.get(key)
        if row is not None and self.rows[row * WIDTH + column] != NONE:
            if column == IMAGE and self.rows[row * WIDTH + TEXT] == self.rows[row * WIDTH + META] == NONE:
                lost.add("a second image of a sample", member.name)
                return
            row = None
        if row is None:
            row, encoded = len(self.rows) // WIDTH, key.encode()
            if key in self.row_of:
                self.repeated.append((key, row))
            self.row_of[key] = row
            self.rows.extend((len(self.keys), len(encoded), NONE, 0, NONE, 0, NONE, 0, 0))
            self.keys += encoded
        self.rows[row * WIDTH + column] = member.header if member.sparse else member.start
        self.rows[row * WIDTH + column + 1] = SPARSE if member.sparse else member.size
