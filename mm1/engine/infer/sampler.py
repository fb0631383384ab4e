"""The Sampler: the next token of each request, by its own Sampling.

Logits of a request are changed by its bias, penalties and grammar, in the order that Sampling's docstring gives, and a
token is drawn. Every operation is of one row alone, so that nobody's token depends on who else is in the batch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import TOP_LOGPROBS, Draw, penalized, sample


class Choice(NamedTuple):
    """Is the next token of one request: its log-probability, and the likeliest tokens with theirs if it asks for them.

    error: why there is none, for its grammar has failed.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    error: Exception | None = None


def choose(
    requests: Sequence[Request], logits: Tensor, tokens: Sequence[int], logprobs: Sequence[float],
    draws: Sequence[Draw | None],
) -> list[Choice]:  # fmt: skip
    """Choose the next token of each of B requests.

    logits [B, V]: of the model. tokens, logprobs: the likeliest of each, or those that were drawn already where `draws`
    has None.
    """
    tokens, logprobs, errors = list(tokens), list(logprobs), {}
    tops: dict[int, list[tuple[int, float]]] = {}
    wanting = [i for i, request in enumerate(requests) if request.sampling.top_logprobs]
    changed = [i for i, draw in enumerate(draws) if draw and not requests[i].sampling.plain]
    if changed:
        rows, errors = _altered(logits[changed].float(), [requests[i] for i in changed])
        settings = torch.tensor([draws[i] for i in changed], dtype=torch.float32, device=logits.device)
        for i, token in zip(changed, sample(rows, *settings.unbind(1)).tolist()):
            tokens[i] = token
        errors = {changed[at]: error for at, error in errors.items()}
    if measured := sorted({*changed, *wanting}):
        logs = logits[measured].float().log_softmax(-1)
        chosen = torch.tensor([tokens[i] for i in measured], device=logits.device)
        for i, logprob in zip(measured, logs.gather(1, chosen[:, None])[:, 0].tolist()):
            logprobs[i] = logprob
        if wanting:
            columns = [x.tolist() for x in alternatives(logs[[measured.index(i) for i in wanting]])]
            tops = {i: list(zip(*pair)) for i, *pair in zip(wanting, *columns)}
    return [
        Choice(tokens[i], logprobs[i], tops.get(i, [])[: request.sampling.top_logprobs], errors.get(i))
        for i, request in enumerate(requests)
    ]


def alternatives(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TOP_LOGPROBS likeliest tokens of each row of log-probabilities [B, V], likeliest first, and theirs.

    The number is always the same: which of equal ones come first might depend on it.
    """
    values, tokens = logs.topk(min(TOP_LOGPROBS, logs.shape[1]))
    return tokens, values


def _altered(rows: Tensor, requests: Sequence[Request]) -> tuple[Tensor, dict[int, Exception]]:
    """Return logits [n, V] after bias, penalties and grammar, and the errors of grammars by row."""
    how = [request.sampling for request in requests]
    bias = _cells(rows, ((i, [t for t, _ in s.biases], [b for _, b in s.biases]) for i, s in enumerate(how)))
    if bias:
        row, token, value = bias
        rows[row, token] += value
    repeats = [(i, requests[i].seen, s.repetition_penalty) for i, s in enumerate(how) if s.repetition_penalty != 1]
    repeated = _cells(rows, ((i, seen, np.full(len(seen), penalty)) for i, seen, penalty in repeats))
    if repeated:
        row, token, penalty = repeated
        rows = penalized(rows, (row, token), penalty)
    written = _cells(rows, (
        (i, list(r.counts), [n * s.frequency_penalty + s.presence_penalty for n in r.counts.values()])
        for i, (r, s) in enumerate(zip(requests, how)) if s.frequency_penalty or s.presence_penalty
    ))  # fmt: skip
    if written:
        row, token, penalty = written
        rows[row, token] -= penalty
    errors: dict[int, Exception] = {}
    for i, request in enumerate(requests):
        if request.grammar:
            try:
                allowed = torch.from_numpy(request.grammar.allowed(rows.shape[1])).to(rows.device)
                rows[i] = torch.where(allowed, rows[i], float("-inf"))
            except RuntimeError as error:
                errors[i] = error
    return rows, errors


def _cells(
    rows: Tensor, parts: Iterable[tuple[int, Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return which cells of [n, V] `parts` name, each (row, tokens, values): rows, tokens int64 and values fp32 [k]."""
    found = [
        (np.full(len(tokens), row), np.asarray(tokens, np.int64), np.asarray(values, float))
        for row, tokens, values in parts
    ]
    if not any(len(tokens) for _, tokens, _ in found):
        return None
    row, token, value = (np.concatenate(column) for column in zip(*found))
    move = torch.as_tensor
    return move(row, device=rows.device), move(token, device=rows.device), move(value, device=rows.device).float()
