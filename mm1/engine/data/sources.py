"""Files of records with random access: indexed once, then any record by its position.

A position always names the same record: a shuffle is a permutation of numbers, and resuming is exact. What is
open or cached (descriptors, unpacked .gz, parquet row groups) belongs to the process, not to the source, so
that one can be pickled. A .gz is unpacked to memory and a .json parsed whole: good for small sets only.
"""

import array
import base64
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from mm1.engine.data.record import Answer, Choice, Record
from mm1.engine.data.samples import PassedOver, Samples
from mm1.engine.data.tar import File, read_member
from mm1.errors import Unreadable, UserError

CAPTIONS = ("caption", "captions", "text")  # fields of a sample's .json, a text or a list of texts
TARS = (".tar", ".tar.gz", ".tgz")
BASE64_PIECE = 1 << 18  # characters that one call decodes
PERCENT_PIECE = 1 << 16
URL_HEAD = 1000  # characters of a data: URL before its data, at most
HEX = np.full(256, 255, np.uint8)  # digits' values by their codes
for _code in b"0123456789abcdefABCDEF":
    HEX[_code] = int(chr(_code), 16)
PARQUET_ROWS = 16  # of a batch of a row group that is too large to be read at once


class _Shard:
    """One file's records: `count` of them, `item(row)` in the file's form or Unreadable, and its damage."""

    count: int
    damage: str | None = None
    passed: PassedOver | None = None  # what records do not hold, and need not

    def __init__(self, file: File):
        self.file = file

    def key(self, row: int) -> str:
        return str(row)

    def item(self, row: int) -> Any:
        raise NotImplementedError


class _Tar(_Shard):
    """The samples of a WebDataset tar: image, and caption of .txt or else of .json."""

    def __init__(self, file: File):
        super().__init__(file)
        self.samples = Samples(file)
        self.count, self.damage, self.passed = len(self.samples), self.samples.damage, self.samples.passed

    def key(self, row: int) -> str:
        return self.samples.key(row)

    def item(self, row: int) -> tuple[bytes, str]:
        image, caption = self.samples.image(row), None
        if (text := self.samples.text(row)) is not None:
            caption = _utf8(text)
        elif (meta := self.samples.meta(row)) is not None and isinstance(fields := _json(meta), dict):
            caption = next((fields[name] for name in CAPTIONS if fields.get(name) is not None), None)
        if caption is None:
            further = f", found {note}" if (note := self.samples.note(row)) else ""
            raise Unreadable(f'image without a caption: expected a .txt or .json ("caption") of the same name{further}')
        return image, _caption(caption)


class _Lines(_Shard):
    """One document a line, blank lines left out. Found by their byte offsets, parsed only when read."""

    def __init__(self, file: File, parse: Callable[[bytes], Any]):
        super().__init__(file)
        self.parse = parse
        data, self.damage = file.whole()
        places = array.array("q")
        start = number = 0
        while start < len(data):
            end = data.find(b"\n", start)
            end = len(data) if end < 0 else end
            number += 1
            if data[start:end].strip():
                places.extend((start, end - start, number))
            start = end + 1
        self.lines = np.array(places, np.int64).reshape(-1, 3)
        self.count = len(self.lines)

    def key(self, row: int) -> str:
        return str(self.lines[row, 2])

    def item(self, row: int) -> Any:
        start, size, _ = self.lines[row].tolist()
        return self.parse(self.file.read(start, size).rstrip(b"\r"))


class _Json(_Shard):
    """A list of documents, or one."""

    def __init__(self, file: File):
        super().__init__(file)
        try:
            self.count = len(_documents(file))
        except Unreadable as error:
            self.count, self.damage = 0, error.reason

    def item(self, row: int) -> Any:
        return _documents(self.file)[row]


class _Parquet(_Shard):
    """One document a row. Reads and keeps whole row groups: small groups make a shuffled read faster."""

    def __init__(self, file: File, columns: tuple[str, ...]):
        super().__init__(file)
        self.columns = columns
        pa, pq = _pyarrow()
        try:
            parquet = pq.ParquetFile(file.path)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{file.path} is not a parquet file: {str(error).splitlines()[0]}") from None
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            raise UserError(f"{file.path} has no column {missing[0]!r}")
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        self.ends, self.count = np.cumsum(sizes), sum(sizes)

    def item(self, row: int) -> Any:
        group, inside = _locate(self.ends, row)
        pa, _ = _pyarrow()
        try:
            rows = _row_group(self.file, group, self.columns)
            if rows is None:
                part, inside = divmod(inside, PARQUET_ROWS)
                rows = _parts_of_group(self.file, group, self.columns)[part]
            return rows.slice(inside, 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Unreadable(f"parquet: {error}") from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow: pip install 'mm1-engine[data]'") from None
    return pyarrow, pyarrow.parquet


@lru_cache(maxsize=4)
def _row_group(file: File, group: int, columns: tuple[str, ...]) -> Any:
    """Return a group's rows as a table, None if they take more than 2 GiB, which Arrow puts into no nested column."""
    pa, pq = _pyarrow()
    try:
        return pq.ParquetFile(file.path).read_row_group(group, columns=list(columns), use_threads=False)
    except pa.ArrowNotImplementedError:
        return None


@lru_cache(maxsize=1)
def _parts_of_group(file: File, group: int, columns: tuple[str, ...]) -> list[Any]:
    """Return a group's rows in batches of PARQUET_ROWS, as large as a group that is read at once: only one is kept."""
    parquet = _pyarrow()[1].ParquetFile(file.path)
    return list(parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=list(columns), use_threads=False))


@lru_cache(maxsize=64)
def _documents(file: File) -> list[Any]:
    value = _json(file.read(0, os.path.getsize(file.path)))
    return value if isinstance(value, list) else [value]


def _locate(ends: np.ndarray, position: int) -> tuple[int, int]:
    """Return which of the things that end at `ends` has a position, and the position inside it."""
    which = int(np.searchsorted(ends, position, side="right"))
    return which, position - (int(ends[which - 1]) if which else 0)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("text is not UTF-8") from None


def _json(data: bytes) -> Any:
    text = _utf8(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"malformed JSON: {error}") from None


def _blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _caption(value: Any) -> str:
    """Return a caption, or the choice of several. Raises Unreadable."""
    if not isinstance(value, list):
        return _checked(value, "caption").strip()
    texts = [_checked(text, "caption").strip() for text in value if not _blank(text)]
    if not texts:
        raise Unreadable("empty caption")
    return texts[0] if len(texts) == 1 else Choice(texts)


def _checked(text: Any, what: str) -> str:
    """Return the text itself, if it is one that a tokenizer can take. Raises Unreadable."""
    if _blank(text):
        raise Unreadable(f"empty {what}")
    if not isinstance(text, str):
        raise Unreadable(f"{what} is of type {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise Unreadable(f"{what} is not valid Unicode") from None
    return text


class Source:
    """Records of all files of `paths` in order. `damage`: (shard, reason) of all found broken while indexing.

    Raises UserError for a path or file that is not what this kind reads, and if there is not a single record.
    source[i] raises Unreadable for a record that cannot be used.
    """

    readers: ClassVar[dict[str, Callable[[File], _Shard]]]

    def __init__(self, paths: str | Path | Sequence[str | Path], base: Path = Path()):
        self._shards = [self._index(path) for path in expand(paths, base)]
        self._ends = np.cumsum([shard.count for shard in self._shards])
        self.damage = tuple((shard.file.path, shard.damage) for shard in self._shards if shard.damage)
        if not len(self):
            why = "; ".join(f"{shard}: {reason}" for shard, reason in self.damage[:1])
            raise UserError(f"no records in {self._shards[0].file.path}" + (f" ({why})" if why else ""))

    def _index(self, path: Path) -> _Shard:
        suffix = next((s for s in self.readers if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise UserError(f"{path}: expected a file ending in {', '.join(self.readers)}")
        try:
            return self.readers[suffix](File.at(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None

    @property
    def passed(self) -> str:
        """Return counts of what records do not hold and need not: folders, members beside image and caption."""
        total = PassedOver()
        for shard in self._shards:
            for kind, (count, first) in (shard.passed.kinds if shard.passed else {}).items():
                total.add(kind, f"{first} in {shard.file.path}", count)
        return str(total)

    @property
    def files(self) -> list[list[Any]]:
        """Return the name without folders, bytes and number of records of each file, in order."""
        shards = [(Path(shard.file.path), shard.count) for shard in self._shards]
        return [[path.name, path.stat().st_size, count] for path, count in shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        which, row = _locate(self._ends, i)
        shard = self._shards[which]
        key = shard.key(row)
        try:
            return Record(self._parts(shard.item(row), Path(shard.file.path).parent), key, shard.file.path)
        except Unreadable as error:
            raise Unreadable(error.reason, shard.file.path, key) from None
        except OSError as error:
            raise Unreadable(str(error.strerror or error), shard.file.path, key) from None

    def _parts(self, item: Any, folder: Path) -> tuple[str | bytes, ...]:
        raise NotImplementedError


class Captions(Source):
    """WebDataset tars: image, then caption from .txt, or from .json under "caption", "captions" or "text".

    A list of captions is a Choice: one of them is drawn each pass.
    """

    readers: ClassVar = dict.fromkeys(TARS, _Tar)

    def _parts(self, item, folder):
        return item


class Text(Source):
    """Documents of text: under "text" in .jsonl and .parquet, one a line in .txt."""

    readers: ClassVar = {
        ".jsonl": partial(_Lines, parse=_json),
        ".jsonl.gz": partial(_Lines, parse=_json),
        ".txt": partial(_Lines, parse=_utf8),
        ".parquet": partial(_Parquet, columns=("text",)),
    }

    def _parts(self, item, folder):
        if not isinstance(item, str | dict):
            raise Unreadable(f"document is of type {type(item).__name__}, expected an object")
        return (_checked(item if isinstance(item, str) else item.get("text"), "text"),)


class Interleaved(Source):
    """Documents in OBELICS form: parallel lists "texts" and "images", one of the two null at each position.

    An image is a path below the shard's folder, "some.tar/member.png" of a tar there, data:image/…;base64,
    bytes, or {"bytes": …, "path": …}. A URL is never fetched.
    """

    readers: ClassVar = {
        ".json": _Json,
        ".jsonl": partial(_Lines, parse=_json),
        ".jsonl.gz": partial(_Lines, parse=_json),
        ".parquet": partial(_Parquet, columns=("texts", "images")),
    }

    def _parts(self, item, folder):
        texts, images = (item.get("texts"), item.get("images")) if isinstance(item, dict) else (None, None)
        if not (isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images)):
            raise Unreadable('expected lists "texts" and "images" of the same length')
        parts: list[str | bytes] = []
        for text, image in zip(texts, images):
            if isinstance(image, dict):  # Hugging Face datasets
                image = image.get("path") if image.get("bytes") is None else image["bytes"]
            if text is not None and image is not None:
                raise Unreadable("text and image at the same position")
            if image is not None:
                parts.append(image if isinstance(image, bytes) else read_image(image, folder))
            elif not _blank(text):
                parts.append(_checked(text, "text"))
        if not parts:
            raise Unreadable("empty document")
        return tuple(parts)


class Conversations(Source):
    """LLaVA's form: "conversations" of {"from": "human" | "gpt", "value": text}, and "image", one or a list, each in
    the place of an <image> of what people say. They ask as "USER: … ASSISTANT:", and answers alone are trained on.

    An image is named as in Interleaved.
    """

    readers: ClassVar = {
        ".json": _Json,
        ".jsonl": partial(_Lines, parse=_json),
        ".jsonl.gz": partial(_Lines, parse=_json),
    }

    def _parts(self, item, folder):
        turns = item.get("conversations") if isinstance(item, dict) else None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            raise Unreadable('expected a list "conversations" of objects')
        named = item.get("image", item.get("images"))
        images = named if isinstance(named, list) else [] if named is None else [named]
        texts = [_checked(turn.get("value"), "turn").strip() for turn in turns]
        speakers = [turn.get("from") for turn in turns]
        if strange := [who for who in speakers if who not in ("human", "gpt")]:
            raise Unreadable(f"a turn is from {strange[0]!r}, expected human or gpt")
        if speakers[-1] != "gpt":
            raise Unreadable("the last turn is no answer")
        marks = sum(text.count("<image>") for text, who in zip(texts, speakers) if who == "human")
        if marks != len(images):
            raise Unreadable(f"{len(images)} images for {marks} marks <image>")
        following, parts = iter(images), []
        for text, who in zip(texts, speakers):
            if who == "gpt":
                parts.append(Answer(f" {text}"))
                continue
            before, *behind = f"USER: {text} ASSISTANT:".split("<image>")
            parts.append(before)
            for text in behind:
                parts += [read_image(next(following), folder), text]
        return tuple(parts)


def decode_base64(text: str) -> bytes:
    """Decode base64, which may hold white space. Raises ValueError.

    It goes by pieces: one call on 30 MB would hold the interpreter's lock for 0.2 s, and every other thread with it.
    """
    pieces: list[bytes] = []
    rest = ""
    for at in range(0, len(text), BASE64_PIECE):
        rest += "".join(text[at : at + BASE64_PIECE].split())
        if rest and pieces and len(pieces[-1]) % 3:
            raise ValueError("data behind the padding")
        if whole := len(rest) // 4 * 4:
            pieces.append(base64.b64decode(rest[:whole], validate=True))
            rest = rest[whole:]
    return b"".join([*pieces, base64.b64decode(rest, validate=True)])


def decode_percent(text: str) -> bytes:
    """Decode ASCII text with percent-encoded bytes; a percent sign without two digits stands for itself.

    It goes by pieces, as decode_base64 does, and by arrays: urllib makes an object of each percent sign.
    """
    pieces: list[bytes] = []
    at = 0
    while at < len(text):
        codes = np.frombuffer(text[at : at + PERCENT_PIECE].encode("ascii"), np.uint8).copy()
        digits = HEX[codes]
        places = np.flatnonzero((codes[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16))
        codes[places] = 16 * digits[places + 1] + digits[places + 2]
        kept = np.ones(len(codes), bool)
        kept[places + 1] = kept[places + 2] = False
        cut = len(codes)
        if at + cut < len(text) and (rest := text.find("%", at + cut - 2, at + cut)) >= 0 and kept[rest - at]:
            cut = rest - at  # the next piece has what belongs to this sign
        pieces.append(codes[:cut][kept[:cut]].tobytes())
        at += cut
    return b"".join(pieces)


def read_image(name: Any, folder: Path) -> bytes:
    """Return the bytes of an image that a document names. Data is not trusted: no name leads out of the folder."""
    if not isinstance(name, str):
        raise Unreadable(f"image is of type {type(name).__name__}, expected a string or bytes")
    if name[:5].lower() == "data:":  # RFC 2397: a type, parameters, "base64", and data that may be percent-encoded
        comma = name.find(",", 0, URL_HEAD)
        head, payload = name[: max(comma, 0)], name[comma + 1 :]
        kind, *parameters = head[5:].lower().split(";")
        if not re.fullmatch(r"image/[\w.+-]+", kind.strip()):
            raise Unreadable(f"image is {(head or name)[:60]!r}, expected data:image/…;base64")
        if not payload.isascii():
            raise Unreadable("a data: URL holds what is not ASCII")
        if not parameters or parameters[-1].strip() != "base64":
            return decode_percent(payload)
        payload = decode_percent(payload).decode("ascii", "replace") if "%" in payload else payload
        try:
            return decode_base64(payload)
        except ValueError as error:
            raise Unreadable(f"image of broken base64: {error}") from None
    if re.match(r"[A-Za-z][\w.+-]*://", name):
        raise Unreadable(
            f"image {name[:200]!r} is a URL, which is never fetched: download the images and name their files, "
            "as the README says under OBELICS"
        )
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise Unreadable(f"image {name!r} is not a path inside the shard's folder")
    for tar in path.parents:
        if tar.name.lower().endswith(TARS) and (folder / tar).is_file():
            return read_member(File.at(_inside(tar, folder)), path.relative_to(tar).as_posix())
    if not (folder / path).is_file():
        raise Unreadable(f"there is no image {name!r} in {folder}")
    return _inside(path, folder).read_bytes()


def _inside(path: PurePosixPath, folder: Path) -> Path:
    """Return the file that a path of a document names. Raises Unreadable if a symbolic link leads it elsewhere."""
    # Resolving takes longer than reading a small image. Elsewhere than on POSIX a path holds more than its parts show.
    steps = islice(accumulate(path.parts, os.path.join, initial=str(folder)), 1, None)
    if os.name == "posix" and not any(map(os.path.islink, steps)):
        return folder / path
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise Unreadable(
            f"image {str(path)!r} leads out of the shard's folder by a symbolic link, which is not followed"
        )
    return target


def expand(paths: str | Path | Sequence[str | Path], base: Path) -> list[Path]:
    """Return the files that paths, globs and ranges as in "a-{00..12}.tar" name, from base. Raises UserError."""
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for pattern in _braces(str(base / Path(path).expanduser())):
            # Names come before patterns: a file may be called a[1].tar.
            hits = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not hits:
                raise UserError(f"no such file: {pattern}")
            if folders := [hit for hit in hits if os.path.isdir(hit)]:
                raise UserError(f"{folders[0]} is a directory: name its files, as in {folders[0]}/*.tar")
            files += map(Path, hits)
    if not files:
        raise UserError("no paths of data are given")
    return files


def _braces(pattern: str) -> Iterator[str]:
    if not (braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        yield pattern
        return
    first, last = braces.groups()
    if int(first) > int(last):
        raise UserError(f"{pattern}: the range {braces[0]} is empty")
    for number in range(int(first), int(last) + 1):
        name = str(number).zfill(len(first))
        yield from _braces(pattern[: braces.start()] + name + pattern[braces.end() :])


KINDS = {"captions": Captions, "interleaved": Interleaved, "text": Text, "conversations": Conversations}


def open_source(kind: str, paths: str | Path | Sequence[str | Path], base: Path) -> Source:
    """Open the source of a kind of data. Raises UserError."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of data {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](paths, base)
