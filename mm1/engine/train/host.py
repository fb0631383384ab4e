"""Estimate the checkpoints and the host memory of a run: bytes and seconds of a checkpoint, bytes of each node.

A checkpoint holds each parameter and the optimizer's state in fp32. A run with one process copies a file at a time to
the host, writes it and reads it back for its checksum while the run waits. With several processes, the run waits only
while each process copies its shards; writing them and reading them back overlaps the next steps
(torch.distributed.checkpoint's async_save), and shards that several processes hold are written once.
"""

from dataclasses import dataclass

from mm1.engine.data import feed
from mm1.engine.data.document import DECODED_AHEAD
from mm1.engine.layers.workload import Workload
from mm1.engine.run_config import Run
from mm1.engine.train.config import Train
from mm1.engine.train.optim import STATE_BYTES

NODE = 8  # GPUs of a node, each with a process
COPIED = 3e9  # bytes/s that one GPU sends to pageable host memory, into which async_save copies; not measured
CHECKSUM = 1.5e9  # bytes/s of SHA-256 on one core with SHA instructions; a file is read by one thread
# Bytes of a stored tensor in addition to its values: its entry in a safetensors header; a zip archive and an entry in
# the metadata of torch.distributed.checkpoint. Measured on checkpoints of a small model.
ENTRY, SHARD_ENTRY = 100, 1_800
TEXTS = 40_000  # bytes of settings, state of the random generator (20 kB) and a small tokenizer
PROCESS = 3e9  # bytes of a training process: torch, the CUDA libraries, NCCL; not measured
LOADER = 0.2e9  # bytes of a loader process: Python, NumPy, Grain, PIL and tokenizers; 184 MB were measured
WAITING = 4  # sequences' worth of tokens in a packer's buffer if data.buffer is 0
STORED = 4 + STATE_BYTES  # bytes of a parameter in a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Hold the estimated sizes and times of a checkpoint."""

    size: float  # bytes on disk
    process: float  # bytes that one process writes, on average
    disk: float  # bytes of train.keep checkpoints and of one during its write
    seconds: dict[str, float]  # of each stage of a save
    waited: float  # seconds that the run waits for one save
    share: float  # of the run's time that it waits for all saves


def checkpoint(
    t: Train, gpus: int, *, parameters: int, stored: int, tensors: int, step: float, storage: float
) -> Checkpoint:
    """Return the sizes and times of a checkpoint.

    parameters: of the model; stored: parameters on the fullest GPU. tensors: stored tensors, or shards of tensors if
    several processes write. step: seconds of a step. storage: bytes/s that a node writes or reads.
    """
    alone = gpus == 1
    size = STORED * parameters + (ENTRY if alone else SHARD_ENTRY) * tensors + TEXTS
    largest = STATE_BYTES * parameters if alone else size / gpus  # the optimizer's file; the file of one process
    rate = storage * -(-gpus // NODE)
    seconds = {
        "copying to host memory": STORED * stored / COPIED,
        "writing": size / rate,
        "reading back for checksums": max(size / rate, largest / CHECKSUM),
    }
    waited = sum(seconds.values())
    if not alone:  # only the copy, or a write that lasts beyond the next save, stops the run
        waited -= min(seconds["writing"] + seconds["reading back for checksums"], t.save_every * step)
    saves = -(-t.steps // t.save_every)
    return Checkpoint(
        size, size / gpus, (t.keep + 1) * size, seconds, waited, saves * waited / (t.steps * step + saves * waited)
    )


def memory(run: Run, gpus: int, load: Workload, *, stored: int) -> dict[str, float]:
    """Return bytes of a node's host memory by purpose, during a save, when all of them are in use.

    stored: parameters on the fullest GPU.
    """
    d, processes = run.data, min(gpus, NODE)
    data_processes = gpus // run.parallel.tensor
    packers = (d.streams or (4 * data_processes if data_processes > 1 else 1)) // data_processes
    pixels = 3 * run.model.images.patch**2 * sum(rows * columns for rows, columns in load.grids)
    token = pixels / load.tokens + 4  # bytes of a token and its share of the pixels
    ahead = max(1, d.workers) * DECODED_AHEAD
    return {
        "training processes": processes * PROCESS,
        "copy of the checkpoint": processes * (STATE_BYTES if gpus == 1 else STORED) * stored,
        "loader processes": processes * packers * d.workers * LOADER,
        "documents decoded ahead": processes * packers * ahead * load.documents[0] * token,
        "documents waiting in packers": processes * packers * (d.buffer or WAITING * load.tokens) * token,
        # Each batch exists twice: as packed, and in pinned memory. The batch in use is counted too.
        "batches": processes * 2 * (feed.AHEAD["cuda"] + 1) * load.tokens * token,
    }
