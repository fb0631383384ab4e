"""Generation: texts that continue prompts, and how likely given answers are."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import pages_of
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import TOKENS, Busy, Engine
from mm1.engine.infer.prompts import Prompt, continued, encode_prompts, last_text, one_text, tokenizer_of
from mm1.engine.infer.request import Request, fitted
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError
from mm1.kernels.dispatch import cdiv


@torch.inference_mode()
def generate(
    model: MM1,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    min_p: float = 0.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    weights: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each prompt, a sequence of texts and PIL images; returns the new texts.

    Settings are those of Sampling and, weights, of Engine; prompt i draws with seed + i. on_text(prompt number, piece)
    is called as text arrives; of a search with beams it arrives at the end. Raises UserError for a prompt longer than
    what the model was trained on; a text ends where the two together are as long.
    """
    sampling = Sampling(
        max_tokens, temperature, top_p, top_k, repetition_penalty, stop, None, num_beams, length_penalty,
        early_stopping, min_p, frequency_penalty, presence_penalty, logit_bias or {},
    )  # fmt: skip
    documents = encode_prompts(model, prompts)
    lengths = [len(document.tokens) for document in documents]
    pages = [pages_of(length, fitted(sampling, length, model.config.context or TOKENS)) for length in lengths]
    count = max(len(prompts), 1)
    engine = Engine(model, tokens=_tokens(pages), batch=count * num_beams, queue=count, weights=weights)
    requests = []
    for i, document in enumerate(documents):
        own = replace(sampling, seed=None if seed is None else seed + i)
        requests.append(engine.submit(document, own, partial(on_text, i) if on_text else None))
    engine.run()
    return [request.text for request in requests]


@torch.inference_mode()
def score(model: MM1, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """Log-probability of each answer behind its prompt, summed over its tokens: for multiple choice.

    Prompt and answer are encoded as one text, and cut behind the prompt (`continued`). A prompt's answers share its
    pages. Raises UserError for an empty answer, and for a prompt and answer longer than what the model was trained on.
    """
    encoded = encode_prompts(model, prompts)
    if len(answers) != len(encoded) or any(isinstance(of, str) for of in answers):
        raise UserError(f"{len(encoded)} prompts, expected as many lists of answers")
    documents = []
    for document, parts, of in zip(encoded, prompts, answers):
        if not all(of):
            raise UserError("an answer to score is empty")
        document, ids = continued(tokenizer_of(model), document, last_text(one_text(parts)), of)
        documents.append([(document, tokens) for tokens in ids])
    flat = [pair for of in documents for pair in of]
    pages = [cdiv(len(prompt.tokens) + len(ids), PAGE) for prompt, ids in flat]
    engine = Engine(model, tokens=_tokens(pages), queue=max(len(flat), 1))
    requests = [[engine.submit_answer(prompt, ids) for prompt, ids in of] for of in documents]
    engine.run()
    return [[sum(request.logprobs) for request in of] for of in requests]


def _tokens(pages: Sequence[int]) -> int:
    """Return the size of a cache for requests of so many pages each: all at once, but at most TOKENS or the largest."""
    return max(min(sum(pages), TOKENS // PAGE), *pages, 1) * PAGE


def several(engine: Engine, prompt: Prompt | Document, n: int, sampling: Sampling) -> list[Request]:
    """n continuations of one prompt, whose pages they share; the i-th draws with seed + i. Others go on meanwhile."""
    document = prompt if isinstance(prompt, Document) else encode_prompts(engine.model, [prompt], engine.context)[0]
    seed = random.randrange(1 << 32) if sampling.seed is None else sampling.seed
    found: list[Request] = []
    while len(found) < n:
        try:
            found.append(engine.submit(document, replace(sampling, seed=seed + len(found))))
        except Busy:
            engine.step()
    while any(request.finish is None for request in found):
        engine.step()
    return found


def n_best(engine: Engine, prompt: Prompt | Document, n: int, sampling: Sampling) -> list[Request]:
    """Return `several`, the likeliest first: by the mean of their tokens' log-probabilities.

    Raises UserError for texts without tokens, which have no such mean.
    """
    if sampling.max_tokens == 0:
        raise UserError("max_tokens is 0, expected at least 1 to compare texts")
    return sorted(several(engine, prompt, n, sampling), key=lambda request: -np.mean(request.logprobs))
