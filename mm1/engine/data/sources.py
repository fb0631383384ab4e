"""Define sources, the formats of training data. A source reads files of records with random access.

The same position always is the same record: a shuffle is a permutation of numbers, and resuming is exact. To add a
format, write a subclass of Source and add a line to KINDS.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mm1.engine.data.folder import FolderShard
from mm1.engine.data.paths import expand
from mm1.engine.data.record import Alternatives, Answer, Label, Media, Record
from mm1.engine.data.references import read_image
from mm1.engine.data.samples import ImageTarShard, MemberCounts, TarShard
from mm1.engine.data.shards import JsonShard, LinesShard, ParquetShard, Shard, decode_utf8, locate, parse_json
from mm1.engine.data.tar import TARS, File
from mm1.errors import Unreadable, UserError

LINES_OF_JSON = partial(LinesShard, parse=parse_json)
JSON_LINES: dict[str, Callable[[File], Shard]] = {".jsonl": LINES_OF_JSON, ".jsonl.gz": LINES_OF_JSON}


def is_blank(text: Any) -> bool:
    """Return whether a text is None, or only white space."""
    return text is None or (isinstance(text, str) and not text.strip())


def _caption(value: Any) -> str:
    """Return a caption, or the Alternatives of several. Raises Unreadable."""
    if not isinstance(value, list):
        return checked_text(value, "caption").strip()
    texts = [checked_text(text, "caption").strip() for text in value if not is_blank(text)]
    if not texts:
        raise Unreadable("empty caption")
    return texts[0] if len(texts) == 1 else Alternatives(texts)


def _image_bytes(image: Any, folder: Path) -> bytes:
    """Return the bytes of an image: bytes, a name that read_image takes, or Hugging Face's dict with one of them."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    return image if isinstance(image, bytes) else read_image(image, folder)


def checked_text(text: Any, name: str) -> str:
    """Return the text itself. Raises Unreadable, with the text's name, for a value that no tokenizer can encode."""
    if is_blank(text):
        raise Unreadable(f"empty {name}")
    if not isinstance(text, str):
        raise Unreadable(f"{name} is of type {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise Unreadable(f"{name} is not valid Unicode") from None
    return text


class Source:
    """Read the records of all files of `paths` in order. source[i] raises Unreadable for a record that cannot be used.

    A subclass is one format of data: `readers` maps the endings of its files to shards, and `parts` converts an item of
    a shard to the parts of a record. folders: the shard that reads a folder; None: folders are refused. damage: (file,
    reason) of the files with damage. Raises UserError for a path or file that this format does not read, and if there
    are no records.
    """

    readers: ClassVar[dict[str, Callable[[File], Shard]]]
    folders: ClassVar[type[Shard] | None] = None

    def __init__(self, paths: str | Path | Sequence[str | Path], base: Path = Path()):
        self._shards = [self._index(path) for path in expand(paths, base, self.folders is not None)]
        self._ends = np.cumsum([shard.count for shard in self._shards])
        self.damage = tuple((shard.file.path, shard.damage) for shard in self._shards if shard.damage)
        if not len(self):
            reason = " ({}: {})".format(*self.damage[0]) if self.damage else ""
            raise UserError(f"no records in {self._shards[0].file.path}{reason}")

    def _index(self, path: Path) -> Shard:
        endings = {s: reader for s, reader in self.readers.items() if path.name.lower().endswith(s)}
        reader = self.folders if path.is_dir() else next(iter(endings.values()), None)
        if reader is None:
            folder = "a folder, or " if self.folders else ""
            raise UserError(f"{path}: expected {folder}a file ending in {', '.join(self.readers)}")
        try:
            return reader(File.at(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None

    @property
    def ignored(self) -> str:
        """Return a description of the members of tars that no record contains, such as folders, with their counts."""
        total = MemberCounts()
        for shard in self._shards:
            for kind, (count, first) in (shard.ignored.kinds if shard.ignored else {}).items():
                total.add(kind, f"{first} in {shard.file.path}", count)
        return str(total)

    @property
    def files(self) -> list[list[Any]]:
        """Return [name without folders, bytes, number of records] of each file, in order."""
        return [[Path(shard.file.path).name, shard.size, shard.count] for shard in self._shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        which, row = locate(self._ends, i)
        shard = self._shards[which]
        path, key = shard.file.path, shard.key(row)
        try:
            return Record(self.parts(shard.item(row), Path(path).parent), key, path)
        except Unreadable as error:
            raise Unreadable(error.reason, path, key) from None
        except OSError as error:
            raise Unreadable(str(error.strerror or error), path, key) from None

    def parts(self, item: Any, folder: Path) -> tuple[str | Media, ...]:
        """Return the texts and media of a shard's item, whose file is in `folder`. Raises Unreadable."""
        raise NotImplementedError


class Captions(Source):
    """Read WebDataset tars: an image, then its caption from .txt, or from .json under "caption", "captions" or "text".

    Each epoch uses one caption of a list (Alternatives).
    """

    readers: ClassVar = dict.fromkeys(TARS, TarShard)

    def parts(self, item, folder):
        image, caption = item
        return Media("image", image), _caption(caption)


class Images(Source):
    """Read images, with a class if there is one: from folders, tars, and parquet with a column "image".

    The class is the first sub-folder in a folder, a .cls in a tar, and "label" in parquet. A parquet's images are as in
    Interleaved.
    """

    readers: ClassVar = {
        **dict.fromkeys(TARS, ImageTarShard),
        ".parquet": partial(ParquetShard, columns=("image",), optional=("label",)),
    }
    folders: ClassVar = FolderShard

    def parts(self, item, folder):
        image, label = (item["image"], item.get("label")) if isinstance(item, dict) else item
        return Media("image", _image_bytes(image, folder)), *([] if label is None else [Label(label)])


class TextSource(Source):
    """Read text documents: under "text" in .jsonl and .parquet, one per line in .txt."""

    readers: ClassVar = JSON_LINES | {
        ".txt": partial(LinesShard, parse=decode_utf8),
        ".parquet": partial(ParquetShard, columns=("text",)),
    }

    def parts(self, item, folder):
        if not isinstance(item, str | dict):
            raise Unreadable(f"document is of type {type(item).__name__}, expected an object")
        return (checked_text(item if isinstance(item, str) else item.get("text"), "text"),)


class Interleaved(Source):
    """Read documents in OBELICS form: parallel lists "texts" and "images", one of the two null at each position.

    An image is a path below the shard's folder, "some.tar/member.png" of a tar there, a data:image/…;base64 URL, bytes,
    or {"bytes": …, "path": …}. Other URLs are never fetched.
    """

    readers: ClassVar = {
        ".json": JsonShard, **JSON_LINES, ".parquet": partial(ParquetShard, columns=("texts", "images")),
    }  # fmt: skip

    def parts(self, item, folder):
        texts, images = (item.get("texts"), item.get("images")) if isinstance(item, dict) else (None, None)
        if not (isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images)):
            raise Unreadable('expected lists "texts" and "images" of the same length')
        parts: list[str | Media] = []
        for text, image in zip(texts, images):
            if isinstance(image, dict) and image.get("bytes") is image.get("path") is None:  # Hugging Face datasets
                if text is None:
                    raise Unreadable("an image with neither bytes nor a path")
                image = None
            if text is not None and image is not None:
                raise Unreadable("text and image at the same position")
            if image is not None:
                parts.append(Media("image", _image_bytes(image, folder)))
            elif not is_blank(text):
                parts.append(checked_text(text, "text"))
        if not parts:
            raise Unreadable("empty document")
        return tuple(parts)


class Conversations(Source):
    """Read conversations in LLaVA's form: turns {"from": "human" | "gpt", "value": text} under "conversations".

    "image" or "images" has one image or a list, named as in Interleaved; each <image> in a human's text is replaced by
    the next one. A human's text becomes "USER: … ASSISTANT:", and only the answers are trained on.
    """

    readers: ClassVar = {".json": JsonShard, **JSON_LINES}

    def parts(self, item, folder):
        turns = item.get("conversations") if isinstance(item, dict) else None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            raise Unreadable('expected a list "conversations" of objects')
        images = item.get("images") if item.get("image") is None else item["image"]
        images = images if isinstance(images, list) else [] if images is None else [images]
        texts = [checked_text(turn.get("value"), "turn").strip() for turn in turns]
        speakers = [turn.get("from") for turn in turns]
        for speaker in speakers:
            if speaker not in ("human", "gpt"):
                raise Unreadable(f"a turn is from {speaker!r}, expected 'human' or 'gpt'")
        if speakers[-1] != "gpt":
            raise Unreadable("the last turn is from 'human', expected 'gpt'")
        marks = sum(text.count("<image>") for text, speaker in zip(texts, speakers) if speaker == "human")
        if marks != len(images):
            raise Unreadable(f"the record has {len(images)} images, expected {marks}, one for each <image>")
        remaining, parts = iter(images), list[str | Media]()
        for text, speaker in zip(texts, speakers):
            if speaker == "gpt":
                parts.append(Answer(f" {text}"))
                continue
            first, *others = f"USER: {text} ASSISTANT:".split("<image>")
            parts.append(first)
            for text in others:
                parts += [Media("image", read_image(next(remaining), folder)), text]
        return tuple(parts)


KINDS = {
    "captions": Captions, "interleaved": Interleaved, "text": TextSource, "conversations": Conversations,
    "images": Images,
}  # fmt: skip


def open_source(kind: str, paths: str | Path | Sequence[str | Path], base: Path) -> Source:
    """Return the source of a kind of data, a key of KINDS. Raises UserError."""
    if kind not in KINDS:
        raise UserError(f"the kind of data is {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind](paths, base)
