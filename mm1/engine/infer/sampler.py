"""Choose the next token of each request by its own Sampling.

Bias, penalties and grammar change a request's logits in the order of Sampling's docstring, and then a token is drawn.
Every operation works on single rows, so that no request's token depends on the rest of the batch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import TOP_LOGPROBS, Draw, penalized, sample


class Choice(NamedTuple):
    """Holds the next token of one request.

    top: the likeliest tokens with their log-probabilities, empty without Sampling.top_logprobs; error: of the grammar,
    in which case the token is not valid.
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

    logits [B, V]: the model's; tokens, logprobs: each row's likeliest token, or the one already drawn where `draws` has
    None.
    """
    tokens, logprobs, errors = list(tokens), list(logprobs), {}
    tops: dict[int, list[tuple[int, float]]] = {}
    with_top = [i for i, request in enumerate(requests) if request.sampling.top_logprobs]
    sampled = [i for i, draw in enumerate(draws) if draw and not requests[i].sampling.plain]
    if sampled:
        rows, errors = _adjusted(logits[sampled].float(), [requests[i] for i in sampled])
        settings = torch.tensor([draws[i] for i in sampled], dtype=torch.float32, device=logits.device)
        for i, token in zip(sampled, sample(rows, *settings.unbind(1)).tolist()):
            tokens[i] = token
        errors = {sampled[at]: error for at, error in errors.items()}
    if measured := sorted({*sampled, *with_top}):
        logs = logits[measured].float().log_softmax(-1)
        chosen = torch.tensor([tokens[i] for i in measured], device=logits.device)
        for i, logprob in zip(measured, logs.gather(1, chosen[:, None])[:, 0].tolist()):
            logprobs[i] = logprob
        if with_top:
            columns = [x.tolist() for x in alternatives(logs[[measured.index(i) for i in with_top]])]
            tops = {i: list(zip(*pair)) for i, *pair in zip(with_top, *columns)}
    return [
        Choice(tokens[i], logprobs[i], tops.get(i, [])[: request.sampling.top_logprobs], errors.get(i))
        for i, request in enumerate(requests)
    ]


def alternatives(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TOP_LOGPROBS likeliest tokens of each row of log-probabilities [B, V] and their values, sorted.

    Their number does not depend on the requests, because the order of equal values might depend on it.
    """
    values, tokens = logs.topk(min(TOP_LOGPROBS, logs.shape[1]))
    return tokens, values


def _adjusted(rows: Tensor, requests: Sequence[Request]) -> tuple[Tensor, dict[int, Exception]]:
    """Return logits [n, V] after bias, penalties and grammar, and the errors of grammars by row."""
    samplings = [request.sampling for request in requests]
    bias = _cells(rows, ((i, [t for t, _ in s.biases], [b for _, b in s.biases]) for i, s in enumerate(samplings)))
    if bias:
        row, token, value = bias
        rows[row, token] += value
    repeats = [
        (i, requests[i].seen, s.repetition_penalty) for i, s in enumerate(samplings) if s.repetition_penalty != 1
    ]
    repeated = _cells(rows, ((i, seen, np.full(len(seen), penalty)) for i, seen, penalty in repeats))
    if repeated:
        row, token, penalty = repeated
        rows = penalized(rows, (row, token), penalty)
    written = _cells(rows, (
        (i, list(r.counts), [n * s.frequency_penalty + s.presence_penalty for n in r.counts.values()])
        for i, (r, s) in enumerate(zip(requests, samplings)) if s.frequency_penalty or s.presence_penalty
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
    """Return rows and tokens int64 [k] and values fp32 [k] of all parts (row, tokens, values); None for no token."""
    columns = [
        (np.full(len(tokens), row), np.asarray(tokens, np.int64), np.asarray(values, float))
        for row, tokens, values in parts
    ]
    if not any(len(tokens) for _, tokens, _ in columns):
        return None
    row, token, value = (np.concatenate(column) for column in zip(*columns))
    move = torch.as_tensor
    return move(row, device=rows.device), move(token, device=rows.device), move(value, device=rows.device).float()
