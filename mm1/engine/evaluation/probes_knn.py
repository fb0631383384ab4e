"""Find the nearest training images of queries by cosine similarity, exactly, and let them vote."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(train: Tensor, queries: Tensor, k: int, *, chunk: int = 1 << 26) -> Tensor:
    """Return the indices int64 [M, k] of the nearest rows of `train` [N, D] for `queries` [M, D], the nearest first.

    Similarities are cosines in fp32; a row of zeros has similarity 0. Of equally similar rows the first is nearer.
    chunk: limit of similarities that are computed at once.
    """
    rows, found = F.normalize(train.float(), dim=1), []
    for part in F.normalize(queries.float(), dim=1).split(max(chunk // max(len(rows), 1), 1)):
        similarity = part @ rows.T
        values, index = similarity.topk(k)
        ambiguous = (similarity >= values[:, -1:]).sum(1) > k  # topk takes any of equal values
        index[ambiguous] = similarity[ambiguous].sort(descending=True, stable=True).indices[:, :k]
        index = index.sort().values
        found.append(index.gather(1, similarity.gather(1, index).sort(descending=True, stable=True).indices))
    return torch.cat(found)


def vote_of_nearest(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Return the class int64 [M] of most of the k nearest rows; of tied classes, the one of the nearest row.

    train [N, D] and labels int64 [N]; queries [M, D].
    """
    classes = labels[nearest(train, queries, k)]  # [M, k]
    votes = (classes[:, :, None] == classes[:, None]).sum(2)  # of each neighbour's class
    return classes.gather(1, votes.argmax(1, keepdim=True))[:, 0]
