"""Generate texts that continue prompts, and score answers to prompts."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mm1.engine.data.document import Document, joined_texts
from mm1.engine.infer.beams import pages_needed
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import TOKENS, Engine
from mm1.engine.infer.prompts import Prompt, continued, encode_prompts, last_text, tokenizer_of
from mm1.engine.infer.request import Request, fitted
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.spec import LanguageModel
from mm1.errors import Busy, UserError
from mm1.kernels.dispatch import cdiv


@torch.inference_mode()
def generate(
    model: LanguageModel, prompts: Sequence[Prompt], *, weights: str | None = None,
    on_text: Callable[[int, str], None] | None = None, **settings: Any,
) -> list[str]:  # fmt: skip
    """Continue each prompt, a sequence of texts and PIL images, and return the new texts.

    settings: fields of Sampling, such as max_tokens=20, temperature=0.7, seed=1, stop=["!"]; prompt i is sampled with
    seed + i. weights: of Engine. on_text(prompt number, piece): called as text arrives; a beam search passes its text
    at the end. A text ends where prompt and text together reach the context that the model was trained on. Raises
    UserError for a longer prompt and for an illegal setting.
    """
    sampling = Sampling(**settings)
    documents = encode_prompts(model, prompts)
    lengths = [len(document.tokens) for document in documents]
    pages = [pages_needed(length, fitted(sampling, length, model.config.context or TOKENS)) for length in lengths]
    count = max(len(prompts), 1)
    engine = Engine(model, tokens=_tokens(pages), batch=count * sampling.num_beams, queue=count, weights=weights)
    requests = []
    for i, document in enumerate(documents):
        seed = None if sampling.seed is None else sampling.seed + i
        requests.append(engine.submit(document, replace(sampling, seed=seed), partial(on_text, i) if on_text else None))
    engine.run()
    return [request.text for request in requests]


@torch.inference_mode()
def score(model: LanguageModel, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return the log-probability of each answer after its prompt, summed over its tokens, for multiple choice.

    Prompt and answer are encoded as one text, which is then cut after the prompt (`continued`). A prompt's answers
    share its pages. Raises UserError for an empty answer, and if prompt and answer exceed the context that the model
    was trained on.
    """
    encoded = encode_prompts(model, prompts)
    if len(answers) != len(encoded) or any(isinstance(texts, str) for texts in answers):
        raise UserError(f"score has {len(encoded)} prompts, expected one list of answers for each")
    documents = []
    for document, parts, texts in zip(encoded, prompts, answers):
        if not all(texts):
            raise UserError("an answer to score is empty, expected a text")
        document, ids = continued(tokenizer_of(model), document, last_text(joined_texts(parts)), texts)
        documents.append([(document, tokens) for tokens in ids])
    flat = [pair for pairs in documents for pair in pairs]
    pages = [cdiv(len(prompt.tokens) + len(ids), PAGE) for prompt, ids in flat]
    engine = Engine(model, tokens=_tokens(pages), queue=max(len(flat), 1))
    requests = [[engine.submit_answer(prompt, ids) for prompt, ids in pairs] for pairs in documents]
    engine.run()
    return [[sum(request.logprobs) for request in answers] for answers in requests]


def _tokens(pages: Sequence[int]) -> int:
    """Return the tokens of a cache for requests of these pages: their sum, but at most TOKENS or the largest one."""
    return max(min(sum(pages), TOKENS // PAGE), *pages, 1) * PAGE


def several(engine: Engine, prompt: Prompt | Document, n: int, sampling: Sampling) -> list[Request]:
    """Return n continuations of one prompt, whose pages they share; text i is sampled with seed + i.

    The engine's other requests go on meanwhile.
    """
    document = engine.encode(prompt)
    seed = random.randrange(1 << 32) if sampling.seed is None else sampling.seed
    requests: list[Request] = []
    while len(requests) < n:
        try:
            requests.append(engine.submit(document, replace(sampling, seed=seed + len(requests))))
        except Busy:
            engine.step()
    while any(request.finish is None for request in requests):
        engine.step()
    return requests


def n_best(engine: Engine, prompt: Prompt | Document, n: int, sampling: Sampling) -> list[Request]:
    """Return n continuations as `several` does, sorted by the mean log-probability of their tokens, highest first.

    Raises UserError for max_tokens 0: texts without tokens have no mean.
    """
    if sampling.max_tokens == 0:
        raise UserError("max_tokens is 0, expected at least 1 to compare texts")
    return sorted(several(engine, prompt, n, sampling), key=lambda request: -np.mean(request.logprobs))
