"""Estimate memory, time, checkpoints and host memory of a run on N GPUs. Nothing is allocated.

    memory   a GPU's shards of parameters, gradients and AdamW's moments; gathered weights; activations
    time     max(operations / (share of peak · peak), FSDP's traffic) + tensor and expert parallelism's traffic + AdamW
    host     bytes and seconds of a checkpoint, host memory of a node (host.py)

Parameters, operations and bytes sent are counted as parallel.py shards and step.py computes. Rates are assumed; `show`
prints every assumption. Sources: Rajbhandari et al. 2020 (ZeRO) for 16 bytes of state per parameter, Zhao et al. 2023
(FSDP) for gathered weights, Korthikanti et al. 2023 for activations.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

from mm1.engine.data.document import DECODED_AHEAD
from mm1.engine.data.record import max_patches
from mm1.engine.layers.layer import prefixed
from mm1.engine.layers.workload import Layout, Workload
from mm1.engine.models.image_input import ImageDraws
from mm1.engine.models.registry import on_meta
from mm1.engine.models.spec import Model, ModelConfig
from mm1.engine.run_config import Run
from mm1.engine.train import host
from mm1.engine.train.host import NODE
from mm1.engine.train.ledger import blocks_of, ledger
from mm1.engine.train.optim import MOMENTS, STATE_BYTES, UPDATE_BYTES
from mm1.errors import UserError, require
from mm1.kernels.device import DEVICES

USABLE = 0.92  # of the memory; the rest is CUDA's, NCCL's, and gaps that the allocator cannot fill
REACHED = 0.8  # of a link's rate
SHARES = {"dense": 0.40, "mixture": 0.25}  # of peak, reached by executed operations
# Rows of the fullest process that shares experts, over the mean. With a balancing loss a capacity of 1.25 drops few
# tokens (Fedus et al. 2022, Switch Transformers); single experts are worse: Wang et al. 2024 (arXiv 2408.15664) report
# 1.5 to 1.7 times the mean with a balancing loss and 1.04 with their balancing by biases.
IMBALANCE = 1.25
STORAGE = 2.0  # GB/s that a node writes to an NVMe drive or an NFS server; parallel file systems reach 10 and more


class Hardware(NamedTuple):
    """Hold the memory and the links of a GPU."""

    memory: float  # bytes
    link: float  # GB/s that a GPU sends to the other GPUs of its node


# From data sheets: capacity, and half of the two-way rate of NVLink, Infinity Fabric or, for RTX, PCIe x16.
HARDWARE = {
    "a100": Hardware(80e9, 300), "a100-40gb": Hardware(40e9, 300), "rtx4090": Hardware(24e9, 32),
    "h100": Hardware(80e9, 450), "h200": Hardware(141e9, 450), "b200": Hardware(180e9, 900),
    "rtx5090": Hardware(32e9, 64), "mi300x": Hardware(192e9, 448),
}  # fmt: skip


class Share(NamedTuple):
    """Describe a parameter on one GPU, in elements."""

    block: str  # the block whose matrices are gathered together, in bf16; "": gathered once per call, in fp32
    used: int  # elements that the GPU computes with
    stored: int  # elements of the fullest GPU: FSDP cuts the first axis, and two GPUs store 2 and 1 of 3 rows
    ranks: int  # GPUs among which the parameter is sharded, `stride` GPUs apart
    stride: int
    parts: int  # different shards on all GPUs, as a checkpoint stores them


@dataclass(frozen=True)
class Plan:
    """Hold the estimate of a run."""

    gpus: int
    device: str
    parameters: int
    shard: int  # GPUs among which parameters are sharded
    uneven: float  # parameters of the fullest GPU over an even share
    memory: dict[str, float]  # bytes on the fullest GPU
    usable: float  # bytes
    remedies: tuple[str, ...]  # changes of settings, each of which would make the run fit
    operations: int  # useful ones of a step
    seconds: dict[str, float]  # of a step, by part
    step: float  # seconds; FSDP's traffic overlaps the operations
    unit: str  # of the next field: "tokens", or "patches" of a model that takes images alone
    tokens_per_second: float
    images_per_second: float
    mfu: float
    days: float  # of all steps and waits for checkpoints
    save_every: int  # steps
    checkpoint: host.Checkpoint
    host: dict[str, float]  # bytes of a node's host memory
    host_memory: float | None  # bytes of a node, if the user gave them
    assumptions: tuple[str, ...]


def plan(
    run: Run, gpus: int, device: str = "h200", *, share: float | None = None, network: float = 50.0,
    document: int = 1024, imbalance: float = IMBALANCE, storage: float = STORAGE, host_memory: float | None = None,
) -> Plan:  # fmt: skip
    """Return the estimate of a run on `gpus` GPUs of a kind in mm1/kernels/device.py.

    share: share of peak that executed operations reach (None: SHARES). network: GB/s that a GPU sends to other nodes.
    document: tokens of a typical document. imbalance: rows of the fullest process that shares experts, over the mean.
    storage: GB/s that a node writes or reads. host_memory: GB of a node (None: not compared).
    Raises UserError with one line for impossible settings or rates.
    """
    t, tensor = run.train, run.parallel.tensor
    require(device in HARDWARE, "device", device, f"one of {', '.join(HARDWARE)}")
    share = SHARES["mixture" if _experts(run.model) else "dense"] if share is None else share
    require(0 < share <= 1, "share of peak", share, "above 0 and at most 1")
    require(1 <= imbalance < math.inf, "imbalance", imbalance, "1 or more")
    positive = {"network": network, "document": document, "storage": storage, "host memory": host_memory}
    for name, value in positive.items():
        require(value is None or 0 < value < math.inf, name, value, "above 0")
    parts, load, hardware = shares(run, gpus), typical(run, document), HARDWARE[device]
    used, usable = memory(run, gpus, load, imbalance), USABLE * hardware.memory
    counted, sequences = ledger(run.model, load, recompute=t.recompute), t.accumulate * tensor // gpus
    executed = sum(
        n * (fullest(run, imbalance) if part in counted.routed else 1) / (tensor if part in counted.split else 1)
        for kind in (counted.forward, counted.backward, counted.padding, counted.recompute)
        for part, n in kind.items()
    )
    peak, stored = DEVICES[device].tflops * 1e12, sum(s.stored for s in parts)
    each = {"operations": executed / (share * peak), **traffic(run, gpus, load, hardware.link, network, imbalance)}
    seconds = {part: sequences * n for part, n in each.items()}
    seconds["AdamW"] = UPDATE_BYTES * stored / (DEVICES[device].bandwidth * 1e9)
    step = sum(seconds.values()) - min(seconds["operations"], seconds["FSDP"])
    where = "them" if run.data.workers else "the packers"
    parameters = sum(parameter.numel() for parameter in on_meta(run.model).parameters())
    tensors = sum((1 + len(MOMENTS)) * s.parts + 1 for s in parts)
    saved = host.checkpoint(
        t, gpus, parameters=parameters, stored=stored, tensors=tensors, step=step, storage=storage * 1e9
    )
    return Plan(
        gpus, device, parameters, _shard(run, gpus), stored / sum(s.used / s.ranks for s in parts), used, usable,
        () if sum(used.values()) <= usable else _remedies(run, gpus, usable, document, imbalance),
        t.accumulate * counted.useful, seconds, step, "patches" if load.prefixes is not None else "tokens",
        t.accumulate * load.tokens / step,
        t.accumulate * len(load.grids) / step, t.accumulate * counted.useful / (step * gpus * peak),
        t.steps * step / (1 - saved.share) / 86_400, t.save_every, saved,
        host.memory(run, gpus, load, stored=stored),
        None if host_memory is None else host_memory * 1e9,
        (
            f"executed operations, recomputation included, run at {share:.0%} of {peak / 1e12:.0f} TFLOP/s",
            _sequence(load),
            f"a step is {t.accumulate} sequences; each tensor group computes {sequences} of them one after the other",
            f"{NODE} GPUs are a node; each sends {hardware.link:g} GB/s inside it and {network:g} GB/s out of it,"
            f" of which {REACHED:.0%} are reached",
            "for every sequence FSDP gathers weights and reduces fp32 gradients while the GPU computes: matrices of"
            " blocks in bf16 forward and backward; norms, biases, routers and all outside of blocks in fp32 once",
            "the run waits for the traffic of tensor and expert parallelism",
            *_expert_assumption(run, imbalance),
            "the residual stream is fp32; activations are counted as eager torch stores them, also for compiled blocks",
            f"{USABLE:.0%} of {hardware.memory / 1e9:.0f} GB of memory are usable",
            f"a node writes and reads {storage:g} GB/s of checkpoints; a GPU copies {host.COPIED / 1e9:g} GB/s to"
            f" pageable host memory; SHA-256 runs at {host.CHECKSUM / 1e9:g} GB/s a file",
            f"a training process takes {host.PROCESS / 1e9:g} GB of host memory, a loader process"
            f" {host.LOADER / 1e9:g} GB; {DECODED_AHEAD} documents are decoded ahead in each of {where}",
            "loading data and failures take no time",
        ),
    )  # fmt: skip


def _sequence(load: Workload) -> str:
    """Describe a sequence in words."""
    images = f"{len(load.grids)} images of {load.patches // max(load.images, 1)} patches"
    if load.prefixes is not None:
        return (
            f"a sequence is {images}; {load.targets} patches are targets, and the pixel head has {load.head_rows} rows"
        )
    documents = f"{load.tokens} tokens in documents of {load.documents[0]}"
    return f"a sequence is {documents}, with {images}; {load.targets} tokens are targets"


def _expert_assumption(run: Run, imbalance: float) -> tuple[str, ...]:
    """Return the assumption about the load of experts, if processes divide them."""
    if not _experts(run.model) or max(run.parallel.tensor, run.parallel.expert) == 1:
        return ()
    bound = run.parallel.capacity
    why = "no token is dropped" if bound is None else f"parallel.capacity is {bound:g}"
    load = fullest(run, imbalance)
    return (f"the fullest process that shares experts computes {load:g} × the mean, in every layer; {why}",)


def fullest(run: Run, imbalance: float) -> float:
    """Return the rows that reach the experts of the fullest process, over the mean of the processes that divide them.

    It is 1 if each process computes all experts for its own tokens, at most n for n processes, and at most
    parallel.capacity, which limits each expert.
    """
    p = run.parallel
    if not _experts(run.model):
        return 1.0
    return min(imbalance, max(p.tensor, p.expert), math.inf if p.capacity is None else max(p.capacity, 1.0))


def typical(run: Run, document: int) -> Workload:
    """Return a full sequence: documents of `document` tokens, as many images as fit the budgets, text as targets.

    A model that takes images alone has as many full images, with prefixes of every length in equal shares.
    """
    d, m = run.data, run.model.images
    if m.draws:
        return _images_alone(run, m.draws)
    require(d.tokens >= m.slots + 2, "setting data.tokens", d.tokens, f"{m.slots + 2} or more, for one image")
    view = max_patches(m)
    patches, images = d.patches or d.images * view, min(d.images, d.tokens // m.slots) if m.slots else 0
    lengths = [document] * (d.tokens // document) + [d.tokens % document] * (d.tokens % document > 0)
    grids = [(1, max(1, min(view, patches // d.images)))] * images
    return Workload(lengths, grids, d.tokens - images * m.slots, d.tokens, d.images, patches)


def _images_alone(run: Run, draws: ImageDraws) -> Workload:
    """Return a full sequence of full images."""
    d, view = run.data, max_patches(run.model.images)
    patches = d.patches or d.images * view
    images = min(d.images, patches // view)
    require(images > 0, "setting data.patches", patches, f"{view} or more, for one image")
    lengths = range(1, max(view, 2))
    prefixes = [
        1 if draws.prefix == "causal" else lengths[(2 * i + 1) * len(lengths) // (2 * images)] for i in range(images)
    ]
    targets = sum(view - prefix for prefix in prefixes)
    return Workload(
        [view] * images, [(1, view)] * images, targets, patches, d.images, patches, prefixes=prefixes,
        computed_head_rows=draws.target_rows(patches, view),
    )  # fmt: skip


@cache
def _experts(c: ModelConfig) -> int:
    """Return the largest number of experts of a layer; 0 for a dense model."""
    blocks = blocks_of(c)
    return max((n.divided_counts()["experts"] for block in blocks for n in block.expert_layers().values()), default=0)


@cache
def _divisions(c: ModelConfig) -> tuple[dict[str, int], dict[str, str], set[str]]:
    """Return how the parameters are divided, by name: their axes, the blocks that gather them, and those of experts."""
    model, blocks = on_meta(c), set(blocks_of(c))
    paths = {block: path for path, block in model.named_modules() if block in blocks}
    layers = {f"{path}.{name}": layer for block, path in paths.items() for name, layer in block.expert_layers().items()}
    return (
        {name: axis for block, path in paths.items() for name, axis in prefixed(path, block.shard_axes())},
        {name: path for block, path in paths.items() for name, _ in prefixed(path, block.autocast_weights())},
        {name for path, layer in layers.items() for name, _ in prefixed(path, layer.shard_axes())},
    )


def shares(run: Run, gpus: int) -> list[Share]:
    """Return the share of every parameter. Raises UserError for incompatible settings of `parallel`."""
    p, result, shard = run.parallel, [], _shard(run, gpus)
    axes, blocks, experts = _divisions(run.model)
    for name, parameter in on_meta(run.model).named_parameters():
        (rows, *columns), axis = parameter.shape, axes.get(name)
        # Experts are divided among `expert` neighbours first, and each part among the other processes that shard.
        apart = p.expert if name in experts else 1
        cuts, ranks, stride = 1 if axis is None else p.tensor * apart, shard // apart, p.tensor * apart
        used = rows * math.prod(columns) // cuts
        across = len(columns) == 2 and columns[0] % ranks == 0  # as parallel.py shards experts
        here = columns[0] if across else rows if axis else rows // cuts
        chunk = -(-here // ranks)
        group = blocks.get(name, "")
        result.append(Share(group, used, chunk * (used // here), ranks, stride, cuts * -(-here // chunk)))
    return result


def _shard(run: Run, gpus: int) -> int:
    """Return the GPUs among which parameters are sharded. Raises UserError for settings that do not fit."""
    p, t, experts = run.parallel, run.train, _experts(run.model)
    shard, rest = divmod(gpus, p.replicate * p.tensor)
    if rest or shard < 1:
        product = f"parallel.replicate {p.replicate} × parallel.tensor {p.tensor}"
        raise UserError(f"settings {product} do not divide {gpus} GPUs")
    if p.tensor > 1 and p.expert > 1:
        raise UserError("settings parallel.tensor and parallel.expert are both above 1")
    require(p.expert == 1 or experts > 0, "setting parallel.expert", p.expert, "1 for a model without experts")
    counts = {("tensor", name, count) for block in blocks_of(run.model)
              for name, count in block.divided_counts().items()}  # fmt: skip
    for setting, name, count in [("expert", "GPUs that shard", shard), ("expert", "experts", experts), *sorted(counts)]:
        value = getattr(p, setting)
        require(count % value == 0, f"setting parallel.{setting}", value, f"a divisor of the {count} {name}")
    data = gpus // p.tensor
    for name, count in (("data.streams", run.data.streams), ("train.accumulate", t.accumulate)):
        require(count % data == 0, f"setting {name}", count, f"a multiple of the {data} processes that take data")
    require(t.dtype != "fp32", "setting train.dtype", t.dtype, "auto or bf16: only bf16's peak rates are known")
    return shard


def memory(run: Run, gpus: int, load: Workload, imbalance: float = IMBALANCE) -> dict[str, float]:
    """Return bytes on the fullest GPU by part, at the start of backward, when all are in use.

    Weights, gradients and moments are fp32, products bf16. imbalance: as for plan().
    """
    p, alone, parts = run.parallel, gpus == 1, shares(run, gpus)
    stored, blocks = sum(s.stored for s in parts), dict.fromkeys((s.block for s in parts), 0)
    for s in parts:
        blocks[s.block] += s.used
    outside, sizes = blocks.pop(""), [*blocks.values()]
    # A single GPU stores a bf16 copy of every weight: those of blocks stay between steps, and autocast makes the others
    # (see copies.py). FSDP gathers the next block while one computes; autocast copies the fp32 weights outside of
    # blocks. The gradients of one block at a time are copied to fp32 and reduced.
    gathered = 2 * stored if alone else 6 * outside + 2 * max(map(sum, zip(sizes, [*sizes[1:], 0])))
    received = fullest(run, imbalance) if p.expert > 1 and _experts(run.model) else 0.0
    layout = Layout(2, tensor=p.tensor, received=received)
    return {
        "parameters": 4 * stored,
        "gradients": 4 * stored,
        "moments of AdamW": STATE_BYTES * stored,
        "gathered weights": gathered,
        "gradients being summed": 0 if alone else max(8 * outside, 6 * max(sizes)),
    } | on_meta(run.model).temporary_bytes(load, layout) | activations(
        run.model, load, layout, recompute=run.train.recompute
    )  # fmt: skip


def activations(c: ModelConfig, load: Workload, layout: Layout, *, recompute: str = "none") -> dict[str, float]:
    """Return the bytes of one sequence's activations, which are stored for backward.

    recompute: as train.recompute. "blocks" stores the input of each block, "selective" also the results of products,
    attention and experts; both add the activations of one recomputed block.
    """
    model: Model = on_meta(c)
    blocks = [block.kept_bytes(load, layout) for block in blocks_of(c)]
    kept = {
        "activations outside of blocks": model.kept_bytes(load, layout),
        "activations of blocks": sum(block.everything for block in blocks),
    }
    if recompute != "none":
        kept["activations of blocks"] = sum(
            block.input + (block.results if recompute == "selective" else 0.0) for block in blocks
        )
        kept["a block computed again"] = max(block.everything for block in blocks)
    return kept


def traffic(
    run: Run, gpus: int, load: Workload, link: float, network: float, imbalance: float = IMBALANCE
) -> dict[str, float]:
    """Return the seconds of communication for one sequence, by kind. link, network: GB/s inside and between nodes.

    imbalance: as for plan().
    """
    p, t = run.parallel, run.train

    def ring(ranks: int, stride: int) -> float:
        """Return bytes/s of a GPU. A group with several GPUs in a node uses the network ports of all of them."""
        out = network * max(1, NODE // stride)
        return REACHED * 1e9 * (link if ranks * stride <= NODE else min(link, out))

    fsdp = 0.0
    for s in shares(run, gpus) if gpus > 1 else ():
        # fp32 gradients, and weights: matrices of blocks in bf16 forward and backward, all others in fp32 once.
        fsdp += 8 * s.stored * (s.ranks - 1) / ring(s.ranks, s.stride)
        copies = 8 * s.stored * (p.replicate - 1) / p.replicate
        fsdp += copies / ring(p.replicate, gpus // p.replicate)
    passes = 3 if t.recompute == "blocks" else 2  # forward, backward, and forward again
    sent = [block.traffic(load) for block in blocks_of(run.model)]
    reduced = 2 * passes * (p.tensor - 1) / p.tensor * sum(block.reduced for block in sent)
    near = min(p.expert, NODE)
    slowest = max((near - 1) / link, (p.expert - near) / network) / (p.expert * REACHED * 1e9)
    # Rows are sent and returned without padding, and the fullest process receives more than it sends.
    routed = 2 * passes * fullest(run, imbalance) * sum(block.routed for block in sent)
    return {"FSDP": fsdp, "tensor": reduced / ring(p.tensor, 1), "expert": routed * slowest}


def _remedies(run: Run, gpus: int, usable: float, document: int, imbalance: float) -> tuple[str, ...]:
    """Return up to three changes of settings with which the run fits, those with fewest settings first."""
    p, t, experts = run.parallel, run.train, _experts(run.model)
    ways = [(1, p.expert), *((2**n, 1) for n in range(1, 4)), *((1, 2**n) for n in range(1, experts.bit_length()))]
    ways = {replace(p, replicate=r, tensor=a, expert=b) for r in (p.replicate, 1) for a, b in ways} | {p}
    fitting: dict[str, int] = {}
    trains = [replace(t, recompute=what) for what in dict.fromkeys((t.recompute, "selective", "blocks"))]
    for scale, way, train in product((1, 2, 4, 8), ways, trains):
        other, changes = replace(run, parallel=way, train=train), [f"{gpus * scale} GPUs"] * (scale > 1)
        changes += [f"train.recompute={train.recompute}"] * (train != t)
        changes += [f"parallel.{name}={n}" for name, n in vars(way).items() if n != getattr(p, name)]
        with suppress(UserError):
            if sum(memory(other, gpus * scale, typical(other, document), imbalance).values()) <= usable:
                fitting[", ".join(changes)] = len(changes) + scale
    return tuple(sorted(fitting, key=lambda text: (fitting[text], text))[:3])


def show(plan: Plan) -> str:
    """Return the plan as lines to print."""
    total, on_host, saved = sum(plan.memory.values()), sum(plan.host.values()), plan.checkpoint
    fits = "fits" if total <= plan.usable else "does not fit"
    remedies = [f"  would fit: {text}" for text in plan.remedies] or ["  no tried change of settings fits"]
    names = {"FSDP": "FSDP (overlaps operations)", "tensor": "tensor parallelism", "expert": "expert parallelism"}
    every = f"every {plan.save_every:,} steps"
    hidden = ("writing", "reading back for checksums") if plan.gpus > 1 else ()
    host_fits = ""
    if plan.host_memory is not None:
        host_fits = f"   {'fits' if on_host <= plan.host_memory else 'does not fit'} in {plan.host_memory / 1e9:g}"
    lines = [
        f"{plan.gpus} × {plan.device}, {plan.parameters / 1e6:,.0f} M parameters, sharded over {plan.shard}",
        *([f"  the fullest GPU stores {plan.uneven:.2f} × an even share"] if plan.uneven > 1.05 else []),
        "", "memory of a GPU, GB",
        *(f"  {name:32}{n / 1e9:8.2f}" for name, n in plan.memory.items() if n),
        f"  {'total':32}{total / 1e9:8.2f}   {fits} in the usable {plan.usable / 1e9:.1f}",
        *(remedies if total > plan.usable else []),
        "", f"time of a step of {plan.operations:.3g} useful operations, s",
        *(f"  {names.get(name, name):32}{n:8.2f}" for name, n in plan.seconds.items() if n),
        f"  {'total':32}{plan.step:8.2f}   MFU {plan.mfu:.1%}",
        "", f"{plan.tokens_per_second:,.0f} {plan.unit}/s, {plan.images_per_second:,.0f} images/s,"
        f" {plan.days:,.1f} days",
        "", f"checkpoint of {_bytes(saved.size)}, {_bytes(saved.process)} a process, {every}, s",
        *(f"  {name:32}{n:8.2f}{'   overlaps the steps' * (name in hidden)}" for name, n in saved.seconds.items()),
        f"  {'the run waits':32}{saved.waited:8.2f}   {saved.share:.1%} of its time",
        f"  {_bytes(saved.disk)} of disk: train.keep checkpoints, and one during its write",
        "", "host memory of a node, GB",
        *(f"  {name:32}{n / 1e9:8.2f}" for name, n in plan.host.items() if n),
        f"  {'total':32}{on_host / 1e9:8.2f}{host_fits}",
        "", "assumed", *(f"  {line}" for line in plan.assumptions),
    ]  # fmt: skip
    return "\n".join(lines)


def _bytes(n: float) -> str:
    unit, scale = next((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if n >= s or u == "MB")
    return f"{n / scale:.3g} {unit}"
