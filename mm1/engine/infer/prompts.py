"""Encode prompts of texts and media as the model's training data was encoded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mm1.engine.data.codecs import Codec, codec_of
from mm1.engine.data.document import Document, document_of, joined_texts
from mm1.engine.data.record import Media, View
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.models.spec import LanguageModel
from mm1.errors import Unreadable, UserError

if TYPE_CHECKING:
    from PIL import Image


Prompt = Sequence["str | Media | Image.Image"]  # texts; media as bytes, or as their codec decodes them
CHARACTERS = 64  # limit for one token, or the longest token if that has more: a tokenizer may drop spaces
MARK = "<image>"


def interleave(
    texts: Sequence[str], images: "Sequence[Image.Image]", *, strict: bool = True
) -> "list[list[str | Image.Image]]":
    """Return a prompt for each text, with the next image in the place of each `<image>`.

    Images without a mark begin the first prompt. Marks beyond the number of images raise UserError, or are text where
    `strict` is false.
    """
    marks = sum(text.count(MARK) for text in texts)
    if strict and marks > len(images):
        raise UserError(f"the prompt has {marks} {MARK} marks, expected at most {len(images)}, one for each image")
    unmarked = max(len(images) - marks, 0)
    opening, following = list(images[:unmarked]), list(images[unmarked:])
    prompts: list[list[str | Image.Image]] = []
    for text in texts:
        parts: list[str | Image.Image] = [*opening]
        opening = []
        for i, piece in enumerate(text.split(MARK, len(following))):
            parts += [following.pop(0)] if i else []
            parts += [piece] if piece else []
        prompts.append(parts)
    return prompts


def encode_prompts(model: LanguageModel, prompts: Sequence[Prompt], context: int | None = None) -> list[Document]:
    """Return prompts as documents.

    Raises UserError for a prompt that is longer than the model's context or than `context` tokens. A text that cannot
    fit is refused before it is encoded, because encoding takes time in proportion to its length.
    """
    c, tokenizer, codec = model.config, tokenizer_of(model), codec_of(model.config)
    limit = min((tokens for tokens in (context, c.context) if tokens), default=None)
    documents = []
    for parts in prompts:
        if limit:
            refuse_long_text(tokenizer, parts, limit)
        documents.append(document_of(tokenizer, c.images.slots, with_views(codec, parts)))
        refuse_long(len(documents[-1].tokens), c.context, context)
    return documents


def sample_document(model: LanguageModel, tokens: int) -> Document:
    """Return a document of `tokens` tokens that begins with a medium of the largest size, if the model takes media."""
    codec, slots, image = codec_of(model.config), model.config.images.slots, tokenizer_of(model).image
    side, channels = codec.patch * math.isqrt(codec.max_patches), codec.empty.values.shape[2]
    view = View(codec.kind, np.zeros((side, side, channels), codec.empty.values.dtype))
    ids = np.full(tokens, int(not image), np.int32)  # any other token
    if not 0 < slots < tokens:
        return Document(ids, (), "")
    ids[:slots] = image
    return Document(ids, (view,), "")


def character_limit(tokenizer: TextTokenizer, tokens: int) -> int:
    """Return the largest number of characters that a text of `tokens` tokens can have."""
    return max(tokenizer.max_characters, CHARACTERS) * tokens


def refuse_long_text(tokenizer: TextTokenizer, parts: Iterable[object], tokens: int) -> int:
    """Return how many characters the texts among `parts` have. Raises UserError if `tokens` tokens cannot hold them."""
    size = sum(len(part) for part in parts if isinstance(part, str))
    if size > (limit := character_limit(tokenizer, tokens)):
        raise UserError(
            f"the prompt has {size} characters, expected at most {limit}, the longest text of {tokens} tokens"
        )
    return size


def with_views(codec: Codec, parts: Prompt) -> "list[str | list[View]]":
    """Return a prompt's parts as document_of takes them: adjacent texts joined, and each medium as its views.

    Raises UserError for a part that is neither text nor a medium of the codec's kind, or cannot be decoded.
    """
    if isinstance(parts, str):
        raise UserError("a prompt is a sequence of texts and media, not str")
    return [part if isinstance(part, str) else _views(codec, part) for part in joined_texts(parts)]


def _views(codec: Codec, part: Any) -> list[View]:
    if isinstance(part, Media):
        if part.kind != codec.kind:
            raise UserError(f"the prompt has a medium of kind {part.kind!r}, expected {codec.kind!r}")
        try:
            medium = codec.decode(part.data)
        except Unreadable as error:
            raise UserError(str(error)) from None
    else:
        medium = codec.check(part)
    return [View(codec.kind, values) for values in codec.views(medium)]


def refuse_long(tokens: int, trained: int | None, cache: int | None) -> None:
    """Raise UserError for a prompt that is longer than the model's context or the cache.

    tokens: of the prompt, and of its answer where that is scored. trained, cache: tokens, None for no limit.
    """
    if trained and tokens > trained:
        raise UserError(f"the prompt has {tokens} tokens, the model was trained on at most {trained}")
    if cache and tokens > cache:
        raise UserError(f"the prompt has {tokens} tokens, the cache holds at most {cache}")


def refuse_malformed(model: LanguageModel, document: Document) -> None:
    """Raise UserError for a document with ids outside the vocabulary, or whose slots do not match its views."""
    tokens, views, vocabulary = document.tokens, len(document.media), model.config.vocabulary
    kind, expected = codec_of(model.config).kind, model.config.images.slots * views
    if not len(tokens):
        raise UserError("the prompt has no tokens, expected at least begin-of-text")
    if (illegal := tokens[(tokens < 0) | (tokens >= vocabulary)]).size:
        raise UserError(f"the prompt has the token id {illegal[0]}, expected 0 to {vocabulary - 1}")
    if (count := int((tokens == tokenizer_of(model).image).sum())) != expected:
        raise UserError(f"the prompt has {count} {kind} tokens, expected {expected} for its {views} {kind}s")
    if other := next((view.kind for view in document.media if view.kind != kind), None):
        raise UserError(f"the prompt has media of kind {other!r}, expected {kind!r}")


def last_text(parts: Sequence[object]) -> str:
    """Return the text at the end of `parts`, "" if they end with a medium or are empty."""
    return parts[-1] if parts and isinstance(parts[-1], str) else ""


def tokenizer_of(model: LanguageModel) -> TextTokenizer:
    """Return the model's tokenizer. Raises UserError where there is none."""
    if not model.config.vocabulary:
        raise UserError(f"a model of kind {model.config.kind} takes images alone and generates no text")
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: generate from a trained checkpoint")
    return model.tokenizer


def continued(
    tokenizer: TextTokenizer, prompt: Document, end: str, answers: Sequence[str]
) -> tuple[Document, list[list[int]]]:
    """Return the prompt and each answer's tokens. `end`, the prompt's last text, is encoded together with the answer.

    An answer that is encoded alone may begin with a token that never follows a text ("▁" in Llama's vocabulary).
    Tokens of `end` that an answer changes are moved from the prompt to the beginning of every answer.
    """
    end_ids = tokenizer.encode(end)
    whole = [tokenizer.encode(end + answer) if answer else end_ids for answer in answers]
    columns = enumerate(zip(end_ids, *whole))
    shared = next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, [end_ids, *whole])))
    tokens = prompt.tokens[: len(prompt.tokens) - len(end_ids) + shared]
    return replace(prompt, tokens=tokens), [ids[shared:] for ids in whole]
