"""The text tokenizer: a tokenizer.json, used so that no text encodes to a control token and all ids decode to one text.

Control tokens are <pad>, <bos>, <eos>, <image> and the other special tokens of the file, except for the unknown token.
A text that spells one is encoded like any other text: in pieces, or as the unknown token where the vocabulary has no
pieces for it.

The text of ids is the bytes of all their tokens, joined and decoded as UTF-8 with one U+FFFD for each broken character
(Unicode 15, section 3.9: maximal subparts). Control tokens and ids of no token add nothing, and the first token that
adds something is written as the file's decoder writes a first one, which may drop a space.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mm1.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a token of byte fallback


class TextTokenizer:
    """Encodes and decodes text. Raises UserError for a missing file, and one that is no usable tokenizer.json."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not Path(path).is_file():
            raise UserError(f"no such tokenizer file: {path}")
        try:
            self.text = Path(path).read_text(encoding="utf-8")
            vocabulary = self.vocabulary
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        how = f"by `mm1 tokenizer NEW --from {path}`"
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise UserError(f"{path} lacks the special tokens {', '.join(missing)}: add them {how}")
        self.pad, self.bos, self.eos, self.image = ids = [vocabulary[token] for token in SPECIAL]
        for number, token in sorted((number, token) for token, number in vocabulary.items() if number in ids):
            if token != (special := SPECIAL[ids.index(number)]):
                raise UserError(f"{path}: {token!r} and {special} have the same id {number}, expected one each")

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("path", "text", "pad", "bos", "eos", "image")}

    def __len__(self) -> int:
        return max(self.vocabulary.values()) + 1  # ids may have gaps

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them a control token. Raises UserError if it cannot be encoded."""
        try:
            # A batch, even of one, is encoded without the interpreter's lock: other threads go on.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:  # half a surrogate pair
            raise UserError("a text is not valid Unicode") from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{self.path} cannot encode a text: {error}") from None
        unknown = self._file.unknown
        return ids if unknown is None else [number for number in ids if number != unknown]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; control tokens and unknown ids add nothing."""
        return b"".join(self.pieces(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int], continued: bool = False) -> Iterator[bytes]:
        """Yield the bytes that each token adds. continued: whether a token with text comes before them."""
        for number in ids:
            yield self._bytes_of(number, not continued)
            continued = continued or number in self._file.names

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes that a token adds to a text when it is not the first token."""
        return self._bytes_of(number, False)

    def has_text(self, number: int) -> bool:
        """Return whether a token adds to a text: it exists and is no control token."""
        return number in self._file.names

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token."""
        return self._file.vocabulary

    @cached_property
    def longest(self) -> int:
        """Return the largest number of characters of one token, including a space that a pre-tokenizer may drop."""
        return max(map(len, self._file.names.values()), default=0) + 1

    @property
    def _tokenizer(self) -> "Tokenizer":
        return self._file.encoder

    @cached_property
    def _file(self) -> "Opened":
        return opened(self.text)

    @cached_property
    def _bytes_cache(self) -> dict[tuple[int, bool], bytes]:
        return {}

    def _bytes_of(self, number: int, first: bool) -> bytes:
        """Return the bytes that a token adds to a text, as its first or a later one."""
        name, cache = self._file.names.get(number), self._bytes_cache
        if name is None:
            return b""
        if (number, first) not in cache:
            cache[number, first] = self._written(name, first)
        return cache[number, first]

    def _written(self, name: str, first: bool) -> bytes:
        kinds = self._file.decoders
        if "ByteLevel" in kinds:
            return bytes_of_characters(name)
        byte = BYTE.fullmatch(name) if "ByteFallback" in kinds else None
        if byte and int(byte[1], 16) >= 0x80:  # the library decodes it only beside the rest of its character
            return bytes([int(byte[1], 16)])
        # The decoder's text of this token beside another token, whose text is cut off.
        anchor, before, after = self._anchor
        text = self._decode([name, anchor] if first else [anchor, name, anchor])
        return text[0 if first else len(before) : len(text) - len(after)].encode()

    @cached_property
    def _anchor(self) -> tuple[str, str, str]:
        """Return a token, its text as a first token, and as a later one: of letters or digits if there is one."""
        token = min(self._file.names.values(), key=lambda n: (not (n.isascii() and n.isalnum()), len(n), n))
        first = self._decode([token])
        return token, first, self._decode([token, token])[len(first) :]

    @cached_property
    def _decode(self) -> Callable[[list[str]], str]:
        decoder = self._tokenizer.decoder
        return " ".join if decoder is None else decoder.decode


class Opened(NamedTuple):
    """Holds the content of a tokenizer.json.

    encoder: has secret random names for the control tokens, so that no text, normalizer or pre-tokenizer spells one,
    and does not truncate, pad or add to a text. vocabulary: the id of each token. names: the tokens that have a text,
    by id. decoders: the types of its decoders. unknown: the id of a control token that is also the unknown token.
    """

    encoder: "Tokenizer"
    vocabulary: dict[str, int]
    names: dict[int, str]
    decoders: set[str]
    unknown: int | None


def opened(text: str) -> Opened:
    """Parse the content of a tokenizer.json; all ids are those of the file."""
    from tokenizers import Tokenizer

    spec = json.loads(text) | {"truncation": None, "padding": None, "post_processor": None}
    unknown, special = unknown_token(spec["model"]), {*SPECIAL, *special_tokens(spec)}
    prefix = secrets.token_hex(16)
    private = {token: f"{prefix}{i}" for i, token in enumerate(sorted(special)) if token != unknown or token in SPECIAL}
    encoder = Tokenizer.from_str(json.dumps(renamed(spec, private)))
    encoder.encode_special_tokens = True  # only the unknown token has its name still
    looks_up = spec["model"]["type"] == "Unigram" or spec["model"].get("ignore_merges")
    if looks_up and spec["model"].get("byte_fallback"):
        _keep_spelled_bytes_apart(encoder)
    public = {name: token for token, name in private.items()}
    vocabulary = {public.get(token, token): number for token, number in encoder.get_vocab().items()}
    silent = {vocabulary[token] for token in special if token in vocabulary}
    names = {number: token for token, number in vocabulary.items() if number not in silent}
    added = (token["content"] for token in spec.get("added_tokens") or ())
    names |= {vocabulary[token]: token for token in added if vocabulary.get(token) in names}
    decoder = spec.get("decoder") or {}
    kinds = {str(part.get("type")) for part in (decoder, *decoder.get("decoders", ()))}
    return Opened(encoder, vocabulary, names, kinds, vocabulary.get(unknown) if unknown in SPECIAL else None)


def _keep_spelled_bytes_apart(encoder: "Tokenizer") -> None:
    """Make the encoder split a text that spells a token of byte fallback, such as "<0x41>", after its "<".

    The model looks whole pieces up in the vocabulary, and bytes by the names of their tokens, so that these cannot be
    renamed.
    """
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    before = [encoder.pre_tokenizer] if encoder.pre_tokenizer else []
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])


def special_tokens(spec: dict[str, Any]) -> list[str]:
    """Return the added tokens of a tokenizer.json that it calls special."""
    return [token["content"] for token in spec.get("added_tokens") or () if token.get("special")]


def unknown_token(model: dict[str, Any]) -> str | None:
    """Return the token that a model uses for unknown pieces of text, None if it has none."""
    number = model.get("unk_id")  # Unigram's
    return model.get("unk_token") if number is None else model["vocab"][number][0]


def renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a tokenizer.json in which tokens have other names and the same ids, without merges that produce one."""
    model = dict(spec["model"])
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        model |= {"unk_token": names.get(unknown, unknown)} if unknown else {}
    else:  # Unigram's: its unknown token is a number
        model["vocab"] = [(names.get(token, token), score) for token, score in vocabulary]
    if "merges" in model:  # some files merge "<" and "s>" of a text into <s>, their <bos>
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
    added = spec.get("added_tokens") or ()
    added = [token | {"content": names.get(token["content"], token["content"])} for token in added]
    return spec | {"model": model, "added_tokens": added}


def bytes_of_characters(token: str) -> bytes:
    """Return the bytes of a token of byte-level BPE.

    Source: Radford et al. 2019 (GPT-2): printable bytes of Latin-1 stand for themselves, all others for the characters
    from U+0100 on. A token with a character beyond these, such as an added one, is its own UTF-8.
    """
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
