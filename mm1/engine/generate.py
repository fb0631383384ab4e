"""Generation: packed prefill of prompts of unequal length, then one token a step for all of them over a KV cache."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document, DocumentEncoder, TextTokenizer
from mm1.engine.data.record import DataError
from mm1.engine.decoder import Cache
from mm1.engine.model import MM1

if TYPE_CHECKING:
    from PIL import Image

Prompt = Sequence["str | Image.Image"]


@torch.inference_mode()
def generate(
    model: MM1,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each prompt, a sequence of texts and PIL images; returns the new texts.

    temperature 0 is greedy; otherwise sampling among the smallest set of tokens with probability ≥ top_p. A text ends
    at the model's end-of-text, before the first stop string, or after max_tokens. on_text(prompt number, piece) is
    called as text arrives.
    """
    tokenizer = tokenizer_of(model)
    if temperature < 0 or not 0 < top_p <= 1 or max_tokens < 1:
        raise DataError(f"temperature {temperature}, top_p {top_p}, max_tokens {max_tokens}: expected ≥ 0, (0, 1], ≥ 1")
    if not prompts:
        return []
    documents = encode_prompts(model, prompts)
    device = model.decoder.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    cache = new_cache(model, documents, max_tokens)
    texts = [_Text(tokenizer, stop, partial(on_text, i) if on_text else None) for i in range(len(prompts))]
    logits = prefill(model, documents, cache)
    for _ in range(max_tokens):
        tokens = sample(logits, temperature, top_p, generator)
        for text, token in zip(texts, tokens.tolist()):
            text.add(token)
        if all(text.done for text in texts):
            break
        logits = model.step(tokens, cache)
    return [text.finish() for text in texts]


def interleave(texts: Sequence[str], images: "Sequence[Image.Image]") -> "list[list[str | Image.Image]]":
    """Prompts of texts in which `<image>` marks the place of the next image; images without a mark open the first."""
    marks = sum(text.count("<image>") for text in texts)
    if marks > len(images):
        raise DataError(f"the prompt has {marks} <image> marks for {len(images)} images")
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


def encode_prompts(model: MM1, prompts: Sequence[Prompt]) -> list[Document]:
    from mm1.engine.data.images import ImagePolicy

    c = model.config
    policy = ImagePolicy(c.vision.patch, c.image_mode, c.image_size, c.image_patches, c.image_parts)
    encode = DocumentEncoder(tokenizer_of(model), policy, c.connector.tokens, exact_budget([], c.vision.patch))
    return [encode.prompt(parts) for parts in prompts]


def new_cache(model: MM1, documents: Sequence[Document], max_tokens: int) -> Cache:
    weight = model.decoder.embedding.weight
    longest = max(len(document.tokens) for document in documents)
    return Cache(model.config.decoder, len(documents), longest + max_tokens, weight.device, weight.dtype)


def prefill(model: MM1, documents: Sequence[Document], cache: Cache) -> Tensor:
    """Run the prompts packed, without padding; logits [B, V] after the last token of each."""
    c = model.config
    budget = exact_budget(documents, c.vision.patch)
    batch = pack(
        documents, budget, image_id=tokenizer_of(model).image, patch=c.vision.patch, slots=c.connector.tokens
    ).to(model.decoder.embedding.weight.device)
    hidden = model.hidden(batch, cache)[0]
    return hidden[batch.cu_seqlens[1:].long() - 1] @ model.decoder.head_weight.T


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Token ids int64 [B] of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0.0)
    return token.gather(-1, torch.multinomial(probability, 1, generator=generator))[:, 0]


def tokenizer_of(model: MM1) -> TextTokenizer:
    if model.tokenizer is None:
        raise DataError("this model has no tokenizer: generate from a trained checkpoint")
    return model.tokenizer


class _Text:
    """The text of one prompt as it grows: ends at end-of-text or before a stop string, and streams what is settled."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], emit: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.emit = tokenizer, [s for s in stop if s], emit
        self.ids: list[int] = []
        self.text, self.sent, self.done = "", 0, False

    def add(self, token: int) -> None:
        if self.done:
            return
        if token == self.tokenizer.eos:
            self.done = True
        else:
            self.ids.append(token)
            self.text = self.tokenizer.decode(self.ids)
            found = [at for s in self.stop if (at := self.text.find(s)) >= 0]
            if found:
                self.text, self.done = self.text[: min(found)], True
        if self.emit:
            self._send(self.text if self.done else self.text[: self._settled()])

    def finish(self) -> str:
        if self.emit:
            self._send(self.text)
        return self.text

    def _settled(self) -> int:
        """Characters that later tokens cannot change: not half a character, not the beginning of a stop string."""
        end = len(self.text.rstrip("\ufffd"))
        for s in self.stop:
            for size in range(min(len(s) - 1, end), 0, -1):
                if self.text[:end].endswith(s[:size]):
                    end -= size
                    break
        return end

    def _send(self, text: str) -> None:
        if self.emit and len(text) > self.sent:
            self.emit(text[self.sent :])
            self.sent = len(text)
