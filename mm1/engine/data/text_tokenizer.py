"""Encode and decode text with a tokenizer.json so that no text becomes a control token, and any ids have one text.

Control tokens are <pad>, <bos>, <eos>, <image> and the other special tokens of the file, except for the unknown token.
A text that spells one is encoded like any other text: in pieces, or as the unknown token where the vocabulary has no
pieces for it.

The text of ids is the bytes of all their tokens, joined and decoded as UTF-8 with one U+FFFD for each broken character
(Unicode 15, section 3.9: maximal subparts). Control tokens and ids of no token have no text. The first token with a
text is written as the file's decoder writes a first token, which may drop a space.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mm1.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a token of byte fallback


class TextTokenizer:
    """Encode and decode text. Raises UserError for a missing file, and for one that is no usable tokenizer.json.

    pad, bos, eos, image: ids of the special tokens. text: the content of the file.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not Path(path).is_file():
            raise UserError(f"no such tokenizer file: {path}")
        try:
            self.text = Path(path).read_text(encoding="utf-8")
            vocabulary = self.vocabulary
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            command = f"mm1 tokenizer NEW --from {path}"
            raise UserError(f"{path} lacks the special tokens {', '.join(missing)}: add them by `{command}`")
        self.pad, self.bos, self.eos, self.image = ids = [vocabulary[token] for token in SPECIAL]
        for number, token in sorted((number, token) for token, number in vocabulary.items() if number in ids):
            if token != (special := SPECIAL[ids.index(number)]):
                raise UserError(f"{path}: {token!r} and {special} have the same id {number}, expected different ids")

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("path", "text", "pad", "bos", "eos", "image")}

    def __len__(self) -> int:
        return max(self.vocabulary.values()) + 1  # ids may have gaps

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them a control token. Raises UserError if it cannot be encoded."""
        try:
            # A batch, even of one text, is encoded without the GIL: other threads continue.
            ids = self._file.encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:  # half a surrogate pair
            raise UserError("a text is not valid Unicode") from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{self.path} cannot encode a text: {error}") from None
        unknown = self._file.unknown
        return ids if unknown is None else [number for number in ids if number != unknown]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; control tokens and unknown ids have none."""
        return b"".join(self.pieces(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int], continued: bool = False) -> Iterator[bytes]:
        """Yield the bytes of each token. continued: whether a token with text precedes them."""
        for number in ids:
            yield self._bytes_of(number, not continued)
            continued = continued or number in self._file.names

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes of a token that is not the first of a text."""
        return self._bytes_of(number, False)

    def has_text(self, number: int) -> bool:
        """Return whether a token has a text: it exists and is no control token."""
        return number in self._file.names

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token."""
        return self._file.vocabulary

    @cached_property
    def max_characters(self) -> int:
        """Return the largest number of characters of one token, including a space that a pre-tokenizer may drop."""
        return max(map(len, self._file.names.values()), default=0) + 1

    @cached_property
    def _file(self) -> "TokenizerFile":
        return parsed(self.text)

    @cached_property
    def _bytes_of(self) -> Callable[[int, bool], bytes]:
        return cache(self._decoded)

    def _decoded(self, number: int, first: bool) -> bytes:
        """Return the bytes of a token as the first or a later one of a text."""
        name, kinds = self._file.names.get(number), self._file.decoders
        if name is None:
            return b""
        if "ByteLevel" in kinds:
            return bytes_of_characters(name)
        byte = BYTE.fullmatch(name) if "ByteFallback" in kinds else None
        if byte and int(byte[1], 16) >= 0x80:  # the library decodes it only together with the rest of its character
            return bytes([int(byte[1], 16)])
        # The decoder's text of this token next to another token, whose text is cut off.
        anchor, before, after = self._anchor
        text = self._decode([name, anchor] if first else [anchor, name, anchor])
        return text[0 if first else len(before) : len(text) - len(after)].encode()

    @cached_property
    def _anchor(self) -> tuple[str, str, str]:
        """Return a token, of letters or digits if possible, its text as a first token, and as a later one."""
        token = min(self._file.names.values(), key=lambda n: (not (n.isascii() and n.isalnum()), len(n), n))
        first = self._decode([token])
        return token, first, self._decode([token, token])[len(first) :]

    @cached_property
    def _decode(self) -> Callable[[list[str]], str]:
        decoder = self._file.encoder.decoder
        return " ".join if decoder is None else decoder.decode


class TokenizerFile(NamedTuple):
    """Hold the content of a tokenizer.json.

    encoder: has secret random names for the control tokens, so that no text, normalizer or pre-tokenizer spells one,
    and does not truncate, pad or add to a text. vocabulary: the id of each token. names: the tokens that have a text,
    by id. decoders: the types of the decoders. unknown: the id of a control token that is also the unknown token.
    """

    encoder: "Tokenizer"
    vocabulary: dict[str, int]
    names: dict[int, str]
    decoders: set[str]
    unknown: int | None


def parsed(text: str) -> TokenizerFile:
    """Parse the content of a tokenizer.json; all ids are those of the file."""
    from tokenizers import Tokenizer

    spec = json.loads(text) | {"truncation": None, "padding": None, "post_processor": None}
    model, added = spec["model"], spec.get("added_tokens") or ()
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram's
        unknown = model["vocab"][model["unk_id"]][0]
    special = {*SPECIAL, *(token["content"] for token in added if token.get("special"))}
    prefix = secrets.token_hex(16)
    private = {token: f"{prefix}{i}" for i, token in enumerate(sorted(special)) if token != unknown or token in SPECIAL}
    encoder = Tokenizer.from_str(json.dumps(renamed(spec, private)))
    encoder.encode_special_tokens = True  # only the unknown token still has its name
    if model.get("byte_fallback") and (model["type"] == "Unigram" or model.get("ignore_merges")):
        _separate_spelled_bytes(encoder)
    public = {name: token for token, name in private.items()}
    vocabulary = {public.get(token, token): number for token, number in encoder.get_vocab().items()}
    control = {vocabulary[token] for token in special if token in vocabulary}
    names = {number: token for token, number in vocabulary.items() if number not in control}
    contents = [token["content"] for token in added]
    names |= {vocabulary[token]: token for token in contents if vocabulary.get(token) in names}
    decoder = spec.get("decoder") or {}
    kinds = {str(part.get("type")) for part in (decoder, *decoder.get("decoders", ()))}
    return TokenizerFile(encoder, vocabulary, names, kinds, vocabulary.get(unknown) if unknown in SPECIAL else None)


def _separate_spelled_bytes(encoder: "Tokenizer") -> None:
    """Make the encoder split a text that spells a token of byte fallback, such as "<0x41>", after its "<".

    The model finds whole pieces in the vocabulary, and bytes by the names of their tokens, so that these cannot be
    renamed.
    """
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    before = [encoder.pre_tokenizer] if encoder.pre_tokenizer else []
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a tokenizer.json in which tokens have other names and the same ids, without merges that produce one."""
    model = dict(spec["model"])
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        model |= {"unk_token": names.get(unknown, unknown)} if unknown else {}
    else:  # Unigram's: its unknown token is a number
        model["vocab"] = [(names.get(token, token), score) for token, score in vocabulary]
    if "merges" in model:  # some files merge "<" and "s>" of a text to <s>, their <bos>
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
    added = spec.get("added_tokens") or ()
    added = [token | {"content": names.get(token["content"], token["content"])} for token in added]
    return spec | {"model": model, "added_tokens": added}


def bytes_of_characters(token: str) -> bytes:
    """Return the bytes of a token of byte-level BPE.

    Source: Radford et al. 2019 (GPT-2): printable bytes of Latin-1 are written as themselves, all others as the
    characters from U+0100 on. A token with other characters, such as an added one, is encoded as UTF-8.
    """
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
