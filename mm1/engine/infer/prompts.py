"""Prompts of texts and images, encoded as a model was trained to see them."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import Document, DocumentEncoder, TextTokenizer
from mm1.engine.models.mm1 import MM1
from mm1.errors import Unreadable, UserError

if TYPE_CHECKING:
    from PIL import Image

    from mm1.engine.data.images import ImagePolicy

Prompt = Sequence["str | Image.Image"]
CHARACTERS = 64  # to a token, at most, unless the vocabulary has longer ones: a tokenizer may drop spaces


def interleave(texts: Sequence[str], images: "Sequence[Image.Image]") -> "list[list[str | Image.Image]]":
    """Prompts of texts in which `<image>` marks the place of the next image; images without a mark open the first."""
    marks = sum(text.count("<image>") for text in texts)
    if marks > len(images):
        raise UserError(f"the prompt has {marks} <image> marks for {len(images)} images")
    spare, rest = list(images[: len(images) - marks]), iter(images[len(images) - marks :])
    prompts: list[list[str | Image.Image]] = []
    for text in texts:
        parts: list[str | Image.Image] = [*spare]
        spare = []
        for i, piece in enumerate(text.split("<image>")):
            parts += [next(rest)] if i else []
            parts += [piece] if piece else []
        prompts.append(parts)
    return prompts


def encode_prompts(model: MM1, prompts: Sequence[Prompt], context: int | None = None) -> list[Document]:
    """Return prompts as documents. Raises UserError for one that is longer than the model's context, or than this.

    One whose text cannot be that short is refused before it is encoded, which takes time in proportion to its length.
    """
    c, encode = model.config, encoder_of(model)
    known = [tokens for tokens in (context, c.context) if tokens]
    documents = []
    for parts in map(checked, prompts):
        if known:
            refuse_long_text(encode.tokenizer, parts, min(known))
        documents.append(encode.prompt(parts))
        refuse_long(len(documents[-1].tokens), c.context, context)
    return documents


def character_limit(tokenizer: TextTokenizer, tokens: int) -> int:
    """Return how many characters a text of so many tokens can have at most."""
    return max(tokenizer.longest, CHARACTERS) * tokens


def refuse_long_text(tokenizer: TextTokenizer, parts: Iterable[object], tokens: int) -> int:
    """Return how many characters the texts among parts have. Raises UserError if so many tokens cannot hold them."""
    size = sum(len(part) for part in parts if isinstance(part, str))
    if size > character_limit(tokenizer, tokens):
        raise UserError(f"the prompt has {size} characters, at most {tokens} tokens fit")
    return size


def refuse_long(tokens: int, trained: int | None, cache: int | None) -> None:
    """Raise UserError for a prompt, with its answer if that is scored, that the model or the cache has no room for."""
    if trained and tokens > trained:
        raise UserError(f"the prompt has {tokens} tokens, the model was trained on at most {trained}")
    if cache and tokens > cache:
        raise UserError(f"the prompt has {tokens} tokens, the cache holds at most {cache}")


def refuse_malformed(document: Document, slots: int, image: int, vocabulary: int) -> None:
    """Raise UserError for ids that are not in the vocabulary, or whose image tokens are not those of the images."""
    tokens, images = document.tokens, len(document.images)
    if not len(tokens):
        raise UserError("the prompt has no tokens, expected at least begin-of-text")
    if (wrong := tokens[(tokens < 0) | (tokens >= vocabulary)]).size:
        raise UserError(f"the prompt has the token id {wrong[0]}, expected 0 to {vocabulary - 1}")
    if (found := int((tokens == image).sum())) != slots * images:
        raise UserError(f"the prompt has {found} image tokens, expected {slots * images} of its {images} images")


def encoder_of(model: MM1) -> DocumentEncoder:
    c = model.config
    return DocumentEncoder(tokenizer_of(model), policy_of(model), c.connector.tokens, exact_budget([], c.vision.patch))


def checked(parts: Prompt) -> "list[str | Image.Image]":
    """Return adjacent texts as one, and images in RGB and upright, whatever they were.

    Raises UserError for what is neither text nor image.
    """
    from PIL import Image

    from mm1.engine.data.images import upright

    wrong = [parts] if isinstance(parts, str) else [p for p in parts if not isinstance(p, str | Image.Image)]
    if wrong:
        raise UserError(f"a prompt is a sequence of texts and PIL images, not {type(wrong[0]).__name__}")
    try:
        return [part if isinstance(part, str) else upright(part) for part in one_text(parts)]
    except Unreadable as error:
        raise UserError(str(error)) from None


def one_text(parts: Iterable[Any]) -> list[Any]:
    """Join adjacent texts, because many a tokenizer begins each text with a space, and leave out empty ones."""
    found: list[Any] = []
    for is_text, some in groupby(parts, key=lambda part: isinstance(part, str)):
        run = list(some)
        found += filter(None, ["".join(run)]) if is_text else run
    return found


def last_text(parts: Sequence[object]) -> str:
    """Return the text that the parts end with, "" if they end with an image."""
    return parts[-1] if parts and isinstance(parts[-1], str) else ""


def policy_of(model: MM1, parts: int | None = None) -> "ImagePolicy":
    """How the model was trained to see an image; parts: with other sub-images, 1 for none."""
    from mm1.engine.data.images import ImagePolicy

    c = model.config
    return ImagePolicy(c.vision.patch, c.image_mode, c.image_size, c.image_patches, parts or c.image_parts)


def tokenizer_of(model: MM1) -> TextTokenizer:
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: generate from a trained checkpoint")
    return model.tokenizer


def continued(
    tokenizer: TextTokenizer, prompt: Document, end: str, answers: Sequence[str]
) -> tuple[Document, list[list[int]]]:
    """Return the prompt and each answer's tokens, as they are when `end`, its last text, and the answer are one text.

    Encoded alone an answer may begin with a token that never follows a text ("▁" in Llama's). Tokens of `end` that
    change before one of the answers are taken from the prompt and stand at the beginning of every answer.
    """
    before = tokenizer.encode(end)
    whole = [tokenizer.encode(end + answer) if answer else before for answer in answers]
    kept = min((_common(before, ids) for ids in whole), default=len(before))
    tokens = prompt.tokens[: len(prompt.tokens) - len(before) + kept]
    return Document(tokens, prompt.images, prompt.key), [ids[kept:] for ids in whole]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
