"""Train many probes on frozen features at once, one for each pair of learning rate and weight decay.

The probes of a grid see the same batches in the same order, so that each equals the probe that is trained alone. The
features are normalised by one BatchNorm without affine parameters, as it has nothing that a probe learns.

    attentive, h < H:  a_h = softmax over the image's patches of x·u_h,   u_h = K_hᵀ q_h / √Dh
                       class scores = W [V_h Σ a_h x]                      x [K, D], q [D], K and V [D, D], W [C, D]
    linear:            class scores = W mean(x) + b

This is AIM's attentive probe: one learned query, keys and values without biases, no projection of the query and none of
the output (El-Nouby et al. 2024, equation 4). The products of query and key are taken before those with the patches,
and values after the sum over patches, which is the same and needs H instead of D columns for each patch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.evaluation.config import ProbeSettings

EPS = 1e-6  # of AIM's BatchNorm
QUERY_STD = 0.02
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class Labelled(NamedTuple):
    """Hold the features of images and their classes.

    features: [P, D] of any float dtype; the rows of image n are first[n] … first[n] + lengths[n] - 1, both int64 [N].
    labels: int64 [N], indices of names. Images may share rows, and need not have all rows.
    """

    features: Tensor
    first: Tensor
    lengths: Tensor
    labels: Tensor
    names: tuple[str, ...]

    @classmethod
    def packed(cls, features: Tensor, cu_seqlens: Tensor, labels: Tensor, names: Sequence[str]) -> "Labelled":
        """Return images whose rows follow each other, cut by cu_seqlens int [N + 1]."""
        return cls(features, cu_seqlens[:-1].long(), cu_seqlens.diff().long(), labels, tuple(names))

    def images(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [ΣK, D] of the images `chosen` int64 [B], and the images' lengths int64 [B]."""
        lengths = self.lengths[chosen]
        begins = self.first[chosen] - lengths.cumsum(0) + lengths
        return self.features[torch.arange(int(lengths.sum())) + begins.repeat_interleave(lengths)], lengths

    def subset(self, chosen: Tensor) -> "Labelled":
        """Return the images `chosen` int64 [B]; features are not copied."""
        own = self.first[chosen], self.lengths[chosen], self.labels[chosen]
        return Labelled(self.features, *own, self.names)

    def pooled(self, chunk: int = 1024) -> "Labelled":
        """Return the mean features fp32 of the images, one row each."""
        means = []
        for chosen in torch.arange(len(self.labels)).split(chunk):
            x, lengths = self.images(chosen)
            owner = torch.arange(len(lengths)).repeat_interleave(lengths)
            sums = torch.zeros(len(lengths), x.shape[1], dtype=torch.float64).index_add_(0, owner, x.double())
            means.append((sums / lengths[:, None]).float())
        rows = torch.cat([self.features[:0].float(), *means])
        return Labelled.packed(rows, torch.arange(len(rows) + 1), self.labels, self.names)


class Probe(NamedTuple):
    """Name the settings of one probe of a grid."""

    rate: float
    decay: float


class AttentiveHeads(nn.Module):
    """Hold the attentive probes of a grid; parameters have the probe as their first axis."""

    undecayed = ("query",)

    def __init__(self, probes: int, width: int, heads: int, classes: int, generator: torch.Generator):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(QUERY_STD * torch.randn(width, generator=generator).expand(probes, -1).clone())
        self.key, self.value = (_uniform(probes, width, width, generator) for _ in range(2))
        self.head = _uniform(probes, classes, width, generator)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the class scores [G, B, C] of normalised rows x [ΣK, D] of images of these lengths."""
        probes, width = self.query.shape
        query = self.query.view(-1, 1, width // self.heads)  # [G·H, 1, Dh]
        keys, values = (w.view(len(query), -1, width) for w in (self.key, self.value))  # [G·H, Dh, D]
        queries = (query @ keys)[:, 0] / math.sqrt(width // self.heads)  # [G·H, D]
        pooled = []
        counts = zip(*(x.tolist() for x in lengths.unique_consecutive(return_counts=True)))
        sizes = [(count, length) for length, count in counts]  # runs of images of one length are one product
        for rows, size in zip(x.split([count * length for count, length in sizes]), sizes):
            images = rows.view(*size, width)
            shares = (images @ queries.T).softmax(1)  # [B, K, G·H]
            pooled.append(shares.transpose(1, 2) @ images)
        y = torch.cat(pooled).transpose(0, 1) @ values.transpose(1, 2)  # [G·H, B, Dh]
        y = y.view(probes, self.heads, len(lengths), -1).transpose(1, 2).flatten(2)
        return y @ self.head.transpose(1, 2)


class LinearHeads(nn.Module):
    """Hold the linear probes of a grid; parameters have the probe as their first axis."""

    undecayed = ("bias",)

    def __init__(self, probes: int, width: int, classes: int, generator: torch.Generator):
        super().__init__()
        self.head = _uniform(probes, classes, width, generator)
        self.bias = nn.Parameter(torch.zeros(probes, 1, classes))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the class scores [G, B, C] of normalised features x [B, D], one row an image."""
        return x @ self.head.transpose(1, 2) + self.bias


def _uniform(probes: int, rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """Return torch's initial values of a linear, the same for each probe: uniform within 1 / √columns."""
    weight = (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)
    return nn.Parameter(weight.expand(probes, -1, -1).clone())


class Trained(NamedTuple):
    """Hold the probes of a grid after training. diverged: bool [G], whose loss or weights are not finite."""

    heads: nn.Module
    norm: nn.BatchNorm1d
    diverged: Tensor

    @torch.no_grad()
    def predict(self, data: Labelled, batch: int) -> tuple[Tensor, Tensor]:
        """Return for each probe the predicted classes int64 [G, N], and the mean loss [G], both on the CPU."""
        order = data.lengths.argsort(stable=True)
        classes = torch.empty(len(self.diverged), len(order), dtype=torch.int64)
        losses = torch.zeros(len(self.diverged), dtype=torch.float64)
        for chosen in order.split(batch):
            scores = self.heads(*_normalised(self.norm, data, chosen))
            classes[:, chosen] = scores.argmax(2).cpu()
            losses += _losses(scores, data.labels[chosen]).double().cpu() * len(chosen)
        return classes, losses / len(order)


def train_probes(heads: nn.Module, data: Labelled, grid: Sequence[Probe], settings: ProbeSettings) -> Trained:
    """Train the probes of a grid with AdamW on cross-entropy; each clips its own gradient.

    heads: parameters of shape [G, …] for G pairs of the grid, whose dtype and device are computed in. The rate rises
    linearly and falls along a cosine to settings.final_rate. A probe that diverges does not change the others.
    """
    parameters = dict(heads.named_parameters())
    some = next(iter(parameters.values()))
    like = {"dtype": some.dtype, "device": some.device}
    norm = nn.BatchNorm1d(data.features.shape[1], EPS, affine=False, **like).train()
    rates, decays = (torch.tensor(values, **like) for values in zip(*grid))
    decayed = [name not in heads.undecayed for name in parameters]  # pyright: ignore[reportOperatorIssue]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters.values()]
    batches = max(len(data.labels) // settings.batch, 1)
    steps = settings.epochs * batches
    losses = torch.zeros_like(rates)
    for step, chosen in enumerate(_batches(data, batches, settings), 1):
        losses = _losses(heads(*_normalised(norm, data, chosen)), data.labels[chosen])
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        clip = (settings.clip / (norms + 1e-6)).clamp(max=1)
        rate = _schedule(step, steps, rates, settings)
        with torch.no_grad():
            for p, g, (mean, square), decay in zip(parameters.values(), gradients, moments, decayed):
                _adamw(p, g * _each(clip, p), mean, square, step, _each(rate, p), decay * _each(decays, p))
    finite = torch.stack([p.flatten(1).isfinite().all(1) for p in parameters.values()]).all(0) & losses.isfinite()
    return Trained(heads, norm.eval(), ~finite.cpu())


def _normalised(norm: nn.BatchNorm1d, data: Labelled, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [ΣK, D] of the images `chosen` int64 [B], and their lengths."""
    x, lengths = data.images(chosen)
    return norm(x.to(norm.running_mean)), lengths


def _batches(data: Labelled, batches: int, settings: ProbeSettings) -> Iterator[Tensor]:
    """Yield the images of each batch, of nearly equal numbers; an epoch has every image once, in random order.

    Images of a batch are in the order of their lengths, so that those of one length are computed together.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order.tensor_split(batches):
            yield chosen[data.lengths[chosen].argsort(stable=True)]


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy [G] of class scores [G, B, C] with labels int64 [B] on any device."""
    losses = F.cross_entropy(scores.flatten(0, 1), labels.to(scores.device).repeat(len(scores)), reduction="none")
    return losses.view(len(scores), -1).mean(1)


def _schedule(step: int, steps: int, rates: Tensor, settings: ProbeSettings) -> Tensor:
    """Return the rates [G] of step 1, 2, … for the peak `rates` [G]."""
    warmup = round(settings.warmup * steps)
    if step <= warmup:
        return rates * step / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    final = rates.clamp(max=settings.final_rate)
    return final + (rates - final) * cosine


def _adamw(p: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: int, rate: Tensor, decay: Tensor) -> None:
    """Apply a step of AdamW (Loshchilov and Hutter 2019, algorithm 2, as torch's) with a rate for each probe."""
    mean.lerp_(g, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(ADAM_EPS)
    p.mul_(1 - rate * decay).sub_(rate / (1 - BETAS[0] ** step) * mean / size)


def _each(values: Tensor, p: Tensor) -> Tensor:
    """Return a value for each probe [G] in a shape that multiplies its parameters p [G, …]."""
    return values.view(-1, *[1] * (p.ndim - 1))
