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
from mm1.engine.infer.sampling import TOP_LOGPROBS, Draw


class NextToken(NamedTuple):
    """Hold the next token of one request.

    top: the likeliest tokens with their log-probabilities, empty without Sampling.top_logprobs; error: of the grammar,
    in which case the token is not valid.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    error: Exception | None = None


def choose_tokens(
    requests: Sequence[Request], logits: Tensor, tokens: Sequence[int], logprobs: Sequence[float],
    draws: Sequence[Draw | None],
) -> list[NextToken]:  # fmt: skip
    """Return the next token of each of B requests.

    logits [B, V]: the model's; tokens, logprobs: each row's likeliest token, or the one already drawn where `draws` has
    None.
    """
    tokens, logprobs, errors = list(tokens), list(logprobs), {}
    tops: dict[int, list[tuple[int, float]]] = {}
    with_top = [i for i, request in enumerate(requests) if request.sampling.top_logprobs]
    sampled = [i for i, draw in enumerate(draws) if draw and not requests[i].sampling.plain]
    if sampled:
        rows, row_errors = _adjusted(logits[sampled].float(), [requests[i] for i in sampled])
        errors = {sampled[row]: error for row, error in row_errors.items()}
        settings = torch.tensor([draws[i] for i in sampled], dtype=torch.float32, device=logits.device)
        for i, token in zip(sampled, draw_tokens(rows, settings).tolist()):
            tokens[i] = token
    if changed := sorted({*sampled, *with_top}):
        logs = logits[changed].float().log_softmax(-1)
        chosen = torch.tensor([tokens[i] for i in changed], device=logits.device)
        for i, logprob in zip(changed, logs.gather(1, chosen[:, None])[:, 0].tolist()):
            logprobs[i] = logprob
        if with_top:
            columns = [x.tolist() for x in alternatives(logs[[changed.index(i) for i in with_top]])]
            tops = {i: list(zip(*pair)) for i, *pair in zip(with_top, *columns)}
    return [
        NextToken(tokens[i], logprobs[i], tops.get(i, [])[: request.sampling.top_logprobs], errors.get(i))
        for i, request in enumerate(requests)
    ]


def alternatives(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TOP_LOGPROBS likeliest tokens of each row of log-probabilities [B, V] and their values, sorted.

    Their number does not depend on the requests, because the order of equal values might depend on it.
    """
    values, tokens = logs.topk(min(TOP_LOGPROBS, logs.shape[1]))
    return tokens, values


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """Return token ids int64 [B] of logits [B, V]. draws: the fields of each row's Draw, fp32 [B, fields of Draw].

    The token is the one at u · total in the remaining probabilities' cumulative sum, likeliest first, so that it does
    not depend on other rows and is the same on every device. Does not synchronize with the GPU.
    """
    temperature, top_p, top_k, u, min_p = draws.unbind(1)
    divisor = torch.where(temperature > 0, temperature, 1.0).clamp(min=1e-6)  # a smaller one may make logits infinite
    probability, token = (logits.float() / divisor[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = ((rank < top_k[:, None]) | (top_k[:, None] == 0)) & (probability > 0)
    first_k = probability * keep
    upto = first_k.cumsum(-1)
    total = torch.where(top_k == 0, 1.0, upto[:, -1])[:, None]
    keep = keep & (upto - first_k < top_p[:, None] * total) & (probability >= min_p[:, None] * probability[:, :1])
    upto = (probability * keep).cumsum(-1)
    # Rounding can put u · total at or above the last sum, because u may be 1 in fp32: then the last kept token, whose
    # probability is above 0, is drawn. If none is kept, as with NaN or a top_p that is 0 in fp32, the first token is.
    place = (upto <= (u * upto[:, -1])[:, None]).sum(-1).clamp(max=keep.sum(-1) - 1).clamp(min=0)
    place = torch.where(temperature > 0, place, 0)
    return token.gather(-1, place[:, None])[:, 0]


def _adjusted(rows: Tensor, requests: Sequence[Request]) -> tuple[Tensor, dict[int, Exception]]:
    """Return logits [n, V] after bias, penalties and grammar, and the errors of grammars by row."""
    numbered = [(i, request, request.sampling) for i, request in enumerate(requests)]
    row, token, bias = _entries(rows, ((i, [t for t, _ in s.biases], [b for _, b in s.biases]) for i, _, s in numbered))
    if len(row):
        rows[row, token] += bias
    row, token, penalty = _entries(rows, (
        (i, r.seen, np.full(len(r.seen), s.repetition_penalty)) for i, r, s in numbered if s.repetition_penalty != 1
    ))  # fmt: skip
    if len(row):
        logit = rows[row, token]
        rows[row, token] = torch.where(logit > 0, logit / penalty, logit * penalty)
    row, token, penalty = _entries(rows, (
        (i, list(r.counts), [n * s.frequency_penalty + s.presence_penalty for n in r.counts.values()])
        for i, r, s in numbered if s.frequency_penalty or s.presence_penalty
    ))  # fmt: skip
    if len(row):
        rows[row, token] -= penalty
    errors: dict[int, Exception] = {}
    for i, request, _ in numbered:
        if request.grammar:
            try:
                allowed = torch.from_numpy(request.grammar.allowed(rows.shape[1])).to(rows.device)
                rows[i] = torch.where(allowed, rows[i], float("-inf"))
            except RuntimeError as error:
                errors[i] = error
    return rows, errors


def _entries(
    rows: Tensor, parts: Iterable[tuple[int, Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and tokens int64 [n] and values fp32 [n] of all parts (row, tokens, values), on the device of `rows`.

    A token occurs once in a part, so that no entry of the logits is changed twice.
    """
    columns = [(np.full(len(tokens), row), np.array(tokens, int), np.array(values)) for row, tokens, values in parts]
    row, token, value = (np.concatenate(column) for column in zip(*columns)) if columns else np.empty((3, 0))
    dtypes = (torch.int64, torch.int64, torch.float32)
    row, token, value = (torch.tensor(x, dtype=t, device=rows.device) for x, t in zip((row, token, value), dtypes))
    return row, token, value
