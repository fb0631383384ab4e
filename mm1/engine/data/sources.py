"""Sources: the formats of training data. A source reads files of records with random access.

A position always is the same record: a shuffle is a permutation of numbers, and resuming is exact. To add a format,
write a subclass of Source and add a line to KINDS.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mm1.engine.data.paths import expand
from mm1.engine.data.record import Answer, Choice, Media, Record
from mm1.engine.data.references import read_image
from mm1.engine.data.samples import MemberCounts
from mm1.engine.data.shards import (
    JsonShard,
    LinesShard,
    ParquetShard,
    Shard,
    TarShard,
    decode_utf8,
    locate,
    parse_json,
)
from mm1.engine.data.tar import TARS, File
from mm1.errors import Unreadable, UserError


def is_blank(text: Any) -> bool:
    """Return whether a text is missing, or empty but for white space."""
    return text is None or (isinstance(text, str) and not text.strip())


def _caption(value: Any) -> str:
    """Return a caption, or the Choice of several. Raises Unreadable."""
    if not isinstance(value, list):
        return checked_text(value, "caption").strip()
    texts = [checked_text(text, "caption").strip() for text in value if not is_blank(text)]
    if not texts:
        raise Unreadable("empty caption")
    return texts[0] if len(texts) == 1 else Choice(texts)


def checked_text(text: Any, what: str) -> str:
    """Return the text itself. Raises Unreadable for a value that no tokenizer can encode. what: its name in errors."""
    if is_blank(text):
        raise Unreadable(f"empty {what}")
    if not isinstance(text, str):
        raise Unreadable(f"{what} is of type {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise Unreadable(f"{what} is not valid Unicode") from None
    return text


class Source:
    """The records of all files of `paths` in order. source[i] raises Unreadable for a record that cannot be used.

    A subclass is one format of data: `readers` maps the endings of its files to shards, and `parts` makes the parts of
    a record of a shard's item. damage: (file, reason) of the files in which the index met damage. Raises UserError for
    a path or file that this format does not read, and if there is not a single record.
    """

    readers: ClassVar[dict[str, Callable[[File], Shard]]]

    def __init__(self, paths: str | Path | Sequence[str | Path], base: Path = Path()):
        self._shards = [self._index(path) for path in expand(paths, base)]
        self._ends = np.cumsum([shard.count for shard in self._shards])
        self.damage = tuple((shard.file.path, shard.damage) for shard in self._shards if shard.damage)
        if not len(self):
            why = "; ".join(f"{shard}: {reason}" for shard, reason in self.damage[:1])
            raise UserError(f"no records in {self._shards[0].file.path}" + (f" ({why})" if why else ""))

    def _index(self, path: Path) -> Shard:
        suffix = next((s for s in self.readers if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise UserError(f"{path}: expected a file ending in {', '.join(self.readers)}")
        try:
            return self.readers[suffix](File.at(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None

    @property
    def ignored(self) -> str:
        """Return the counts of members of tars that no record contains, such as folders, in words."""
        total = MemberCounts()
        for shard in self._shards:
            for kind, (count, first) in (shard.ignored.kinds if shard.ignored else {}).items():
                total.add(kind, f"{first} in {shard.file.path}", count)
        return str(total)

    @property
    def files(self) -> list[list[Any]]:
        """Return [name without folders, bytes, number of records] of each file, in order."""
        shards = [(Path(shard.file.path), shard.count) for shard in self._shards]
        return [[path.name, path.stat().st_size, count] for path, count in shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        which, row = locate(self._ends, i)
        shard = self._shards[which]
        key = shard.key(row)
        try:
            return Record(self.parts(shard.item(row), Path(shard.file.path).parent), key, shard.file.path)
        except Unreadable as error:
            raise Unreadable(error.reason, shard.file.path, key) from None
        except OSError as error:
            raise Unreadable(str(error.strerror or error), shard.file.path, key) from None

    def parts(self, item: Any, folder: Path) -> tuple[str | Media, ...]:
        """Return the texts and media of a shard's item, whose file is in `folder`. Raises Unreadable."""
        raise NotImplementedError


class Captions(Source):
    """WebDataset tars: an image, then its caption from .txt, or from .json under "caption", "captions" or "text".

    Of a list of captions one is drawn each epoch (Choice).
    """

    readers: ClassVar = dict.fromkeys(TARS, TarShard)

    def parts(self, item, folder):
        image, caption = item
        return Media("image", image), _caption(caption)


class Text(Source):
    """Text documents: under "text" in .jsonl and .parquet, one a line in .txt."""

    readers: ClassVar = {
        ".jsonl": partial(LinesShard, parse=parse_json),
        ".jsonl.gz": partial(LinesShard, parse=parse_json),
        ".txt": partial(LinesShard, parse=decode_utf8),
        ".parquet": partial(ParquetShard, columns=("text",)),
    }

    def parts(self, item, folder):
        if not isinstance(item, str | dict):
            raise Unreadable(f"document is of type {type(item).__name__}, expected an object")
        return (checked_text(item if isinstance(item, str) else item.get("text"), "text"),)


class Interleaved(Source):
    """Documents in OBELICS form: parallel lists "texts" and "images", one of the two null at each position.

    An image is a path below the shard's folder, "some.tar/member.png" of a tar there, a data:image/…;base64 URL, bytes,
    or {"bytes": …, "path": …}. Other URLs are never fetched.
    """

    readers: ClassVar = {
        ".json": JsonShard,
        ".jsonl": partial(LinesShard, parse=parse_json),
        ".jsonl.gz": partial(LinesShard, parse=parse_json),
        ".parquet": partial(ParquetShard, columns=("texts", "images")),
    }

    def parts(self, item, folder):
        texts, images = (item.get("texts"), item.get("images")) if isinstance(item, dict) else (None, None)
        if not (isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images)):
            raise Unreadable('expected lists "texts" and "images" of the same length')
        parts: list[str | Media] = []
        for text, image in zip(texts, images):
            if isinstance(image, dict):  # Hugging Face datasets
                image = image.get("path") if image.get("bytes") is None else image["bytes"]
                if image is None and text is None:
                    raise Unreadable("an image with neither bytes nor a path")
            if text is not None and image is not None:
                raise Unreadable("text and image at the same position")
            if image is not None:
                parts.append(Media("image", image if isinstance(image, bytes) else read_image(image, folder)))
            elif not is_blank(text):
                parts.append(checked_text(text, "text"))
        if not parts:
            raise Unreadable("empty document")
        return tuple(parts)


class Conversations(Source):
    """LLaVA's form: "conversations" of {"from": "human" | "gpt", "value": text}, and "image" or "images", one
    or a list.

    Each <image> in a human's text is replaced by the next image, which is named as in Interleaved. A human's text
    becomes "USER: … ASSISTANT:", and only the answers are trained on.
    """

    readers: ClassVar = {
        ".json": JsonShard,
        ".jsonl": partial(LinesShard, parse=parse_json),
        ".jsonl.gz": partial(LinesShard, parse=parse_json),
    }

    def parts(self, item, folder):
        turns = item.get("conversations") if isinstance(item, dict) else None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            raise Unreadable('expected a list "conversations" of objects')
        named = item.get("images") if item.get("image") is None else item["image"]
        images = named if isinstance(named, list) else [] if named is None else [named]
        texts = [checked_text(turn.get("value"), "turn").strip() for turn in turns]
        speakers = [turn.get("from") for turn in turns]
        if strange := [who for who in speakers if who not in ("human", "gpt")]:
            raise Unreadable(f"a turn is from {strange[0]!r}, expected human or gpt")
        if speakers[-1] != "gpt":
            raise Unreadable("the last turn is no answer")
        marks = sum(text.count("<image>") for text, who in zip(texts, speakers) if who == "human")
        if marks != len(images):
            raise Unreadable(f"{len(images)} images for {marks} marks <image>")
        following, parts = iter(images), list[str | Media]()
        for text, who in zip(texts, speakers):
            if who == "gpt":
                parts.append(Answer(f" {text}"))
                continue
            first, *others = f"USER: {text} ASSISTANT:".split("<image>")
            parts.append(first)
            for text in others:
                parts += [Media("image", read_image(next(following), folder)), text]
        return tuple(parts)


KINDS = {"captions": Captions, "interleaved": Interleaved, "text": Text, "conversations": Conversations}


def open_source(kind: str, paths: str | Path | Sequence[str | Path], base: Path) -> Source:
    """Return the source of a kind of data, a key of KINDS. Raises UserError."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of data {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](paths, base)
