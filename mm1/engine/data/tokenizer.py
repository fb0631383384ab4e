"""Make the tokenizer.json of a run: byte-level BPE trained on text, or an existing one with the special tokens added.

Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (GPT-2) for bytes as its alphabet.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mm1.engine.data.paths import expand
from mm1.engine.data.record import Alternatives
from mm1.engine.data.sources import KINDS, Source, open_source
from mm1.engine.data.text_tokenizer import SPECIAL, renamed
from mm1.errors import Unreadable, UserError

ROWS = 64  # the vocabulary is a multiple of this, so that products with the head have whole tiles of tensor cores
MIN_TOKENS = 256 + len(SPECIAL)  # each byte is a token, so that any text can be encoded
TRIED = 16  # a file is not of a kind of data if this number of its first records are unreadable


def vocabulary_size(tokens: int) -> int:
    """Return the smallest multiple of ROWS that holds `tokens` ids."""
    return -(-tokens // ROWS) * ROWS


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a tokenizer of at most `vocabulary` tokens that encodes any text; ids 0 to 3 are the special tokens.

    Raises UserError if there is no text, or if `vocabulary` is smaller than MIN_TOKENS.
    """
    if vocabulary < MIN_TOKENS:
        raise UserError(
            f"--vocabulary is {vocabulary}, expected at least {MIN_TOKENS}: 256 bytes and {len(SPECIAL)} special tokens"
        )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = iter(texts)
    if (first := next(texts, None)) is None:
        raise UserError("no text to train a tokenizer on")
    trained.train_from_iterator(chain([first], texts), trainer)
    return trained


def texts_of(files: Iterable[str]) -> Iterator[str]:
    """Yield every text of the files, which may be patterns; unreadable records are counted and skipped.

    Raises UserError for a file that no kind of data can read.
    """
    unreadable = 0
    for path in expand(list(files), Path()):
        source = _source(path)
        for i in range(len(source)):
            try:
                for part in source[i].parts:
                    if isinstance(part, str):
                        yield from part.texts if isinstance(part, Alternatives) else (str(part),)
            except Unreadable:
                unreadable += 1
    if unreadable:
        print(f"{unreadable} records could not be read and were skipped")


def _source(path: Path) -> Source:
    """Return a file as a source of the first kind of data that can read one of the first TRIED records."""
    kinds = [kind for kind, source in KINDS.items() if path.name.lower().endswith(tuple(source.readers))]
    if not kinds:
        endings = dict.fromkeys(ending for source in KINDS.values() for ending in source.readers)
        raise UserError(f"{path}: expected a file ending in {', '.join(endings)}")
    reasons = []
    for kind in kinds:
        reason = ""
        try:
            source = open_source(kind, path, Path())
            for i in range(min(TRIED, len(source))):
                try:
                    source[i]
                    return source
                except Unreadable as error:
                    reason = reason or error.reason
        except UserError as error:
            reason = str(error)
        reasons.append(f"as {kind}: {reason}")
    raise UserError(f"{path} has no text that can be read; {'; '.join(reasons)}")


def with_special_tokens(path: Path) -> tuple[str, int, int]:
    """Return a tokenizer.json with the missing special tokens added, and the number of its ids before and after.

    The tokens that tokenizer_config.json calls bos and eos are renamed to <bos> and <eos>, and keep their ids, whose
    embeddings are trained. Raises UserError if the file is no tokenizer.json.
    """
    text, settings = json.dumps(json_object(path)), path.with_name("tokenizer_config.json")
    try:
        old = Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json: {error}") from None
    names = _new_names(old, json_object(settings) if settings.is_file() else {})
    spec = renamed(json.loads(old.to_str()), names)
    count, vocabulary = id_count(old), spec["model"]["vocab"]
    if isinstance(vocabulary, dict) and len(vocabulary) <= max(vocabulary.values(), default=-1):
        # The library counts tokens to find the next id, which in a vocabulary with gaps belongs to another token.
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]} | vocabulary
        new_ids = {token: count + i for i, token in enumerate(token for token in SPECIAL if token not in ids)}
        spec["model"]["vocab"] = ids | new_ids
    # The engine adds <bos> and <eos> itself; a template could refer to tokens that were renamed.
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    new = Tokenizer.from_str(json.dumps(spec))
    new.add_special_tokens(list(SPECIAL))
    return new.to_str(), count, id_count(new)


def id_count(tokenizer: Tokenizer) -> int:
    """Return the number of rows that an embedding needs: ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _new_names(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return new names for tokens of `tokenizer`. One that is both bos and eos becomes <eos>, which ends texts."""
    names: dict[str, str] = {}
    for new, field in (("<eos>", "eos_token"), ("<bos>", "bos_token")):
        old = settings.get(field)
        old = old["content"] if isinstance(old, dict) else old
        if old and tokenizer.token_to_id(old) is not None and tokenizer.token_to_id(new) is None:
            names.setdefault(old, new)
    return names


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError if the file is missing or has another value."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
