"""Compile each op's kernels for a GPU that need not be here, and judge their machine code: `mm1 bench static`.

For each kernel, at the op's main size and in its configuration for this GPU:

    instructions a MFLOP  of all warps in a step of the main loop, over the operations of its matrix instructions
    issue, tensor         clocks in which a step's instructions are issued, and in which its products are computed
    tensor share          tensor / max(issue, tensor): below 1 the loop is limited by its instructions
    in loop               share of a multiprocessor's time in which some program runs its loop (cost_model.py)
    programs              on a multiprocessor at once, by registers, shared memory and threads
    seconds, bytes        predicted from the machine code; bytes moved at least

The same facts are printed for kernels of other libraries where they are installed (static_peers.py). Nothing is timed.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mm1.autotune.space import KERNELS, Inputs
from mm1.autotune.static import Compiled, compile_launch, distinct
from mm1.bench.page import digits, percent
from mm1.bench.record import Record, Row
from mm1.bench.static_peers import EXPERTS, FFN, LOGITS, PEERS, TOKENS, VOCABULARY, WIDTH, K, Peer
from mm1.errors import UserError
from mm1.integrations.torchvision import declare_operators
from mm1.kernels.abstractor import depthwise
from mm1.kernels.cost_model import SCHEDULERS, Code, Product, Rows, resident
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import Launch, recording
from mm1.kernels.linear_cross_entropy import loss_in_place
from mm1.kernels.moe import combine, routing
from mm1.kernels.patches import position_tables
from mm1.kernels.tuning import config_for

DTYPE = torch.bfloat16
IMAGES = (46656, 64)  # patches of 64 images of 378 pixels, and images
SLOTS = TOKENS * K


class Case(NamedTuple):
    """Hold a kernel that has configurations, at a size of an op."""

    op: str
    name: str  # of the size
    kernel: str  # in KERNELS
    shape: tuple[Any, ...]
    only: tuple[str, Any] | None = None  # an argument of the launches that belong to this case

    def launches(self, device: Device) -> list[Launch]:
        """Return each different launch of an example, helpers included."""
        kernel = KERNELS[self.kernel]
        with recording(device) as recorded:
            kernel.example(kernel.tunable.shape(*self.shape), Inputs("meta", DTYPE))()
        name, value = self.only or ("", None)
        return [one for one in distinct(recorded) if one.arguments.get(name, value) == value]

    def work(self, device: Device) -> Product | Rows:
        """Return the work of the kernel in its configuration for this GPU."""
        tunable: Any = KERNELS[self.kernel].tunable
        shape = tunable.shape(*self.shape)
        return tunable.seconds.work(config_for(tunable, shape, DTYPE, device), shape, DTYPE, device)


CASES = [
    Case("moe_mlp", "up", "experts_up", (SLOTS, EXPERTS, WIDTH, FFN, True)),
    Case("moe_mlp", "down", "grouped_gemm", (SLOTS, EXPERTS, FFN, WIDTH)),
    Case("moe_mlp", "dh", "experts_dh", (SLOTS, EXPERTS, WIDTH, FFN)),
    Case("moe_mlp", "dx", "grouped_gemm", (SLOTS, EXPERTS, 2 * FFN, WIDTH)),
    Case("moe_mlp", "dgate_up", "grouped_gemm_dw", (SLOTS, EXPERTS, 2 * FFN, WIDTH, True), ("A_FAN", 0)),
    Case("moe_mlp", "ddown", "grouped_gemm_dw", (SLOTS, EXPERTS, WIDTH, FFN, True), ("B_FAN", 0)),
    Case("moe_mlp", "decode, 16 tokens", "few_tokens", (16 * K, EXPERTS, WIDTH, FFN, True)),
    Case("patch_embed", "ViT-H", "patch_embed", (IMAGES[0], 588, 1280)),
    Case("patch_embed", "ViT-H", "patch_embed_dw", (IMAGES[0], 588, 1280)),
    Case("embed_patches", "SO400M", "patch_embed", (IMAGES[0], 768, 1152)),
    Case("patch_loss", "AIM", "patch_loss", (IMAGES[0], 2048, 588)),
    *(Case("conv_block", kernel, kernel, (IMAGES[0], 1024)) for kernel in (
        "conv_norm", "conv_walk_value", "conv_join", "conv_join_backward", "conv_walk_gated", "conv_walk_backward",
        "conv_walk_input")),
    Case("conv_block", "conv_gate", "conv_gate", (IMAGES[0], 1024, 1024)),
    Case("adaptive_pool", "1024 channels", "adaptive_pool", (IMAGES[0], 1024)),
    *(Case("attention", name, kernel, (rows, *sizes)) for name, rows, sizes in (
        ("64 images", 729, (64 * 16, 64 * 16, 80, False)), ("4 documents", 2048, (4 * 32, 4 * 8, 128, True)))
      for kernel in ("flash", "flash_dq", "flash_dkv")),
    Case("paged_attention", "64 segments of 4096", "paged_attention", (4096, 64 * 8, 4, 128)),
]  # fmt: skip


def _route(new: Inputs) -> None:
    logits = new.floats(TOKENS, EXPERTS)
    choice, weight, first, balance, z = routing.route_forward(logits, None, K, True)
    routing.route_backward(weight, balance, z, logits, None, choice, first, True)
    _, position, offsets, *_ = routing.sort(choice, EXPERTS)
    combine.combine(new.floats(SLOTS, WIDTH), position, weight, offsets=offsets)


def _positions(new: Inputs) -> None:
    grids, table = new.grids(IMAGES[0]), new.floats(27, 27, 1280)
    y = position_tables.forward(table, grids.table, grids.owner, 1, "bilinear", True, False)
    position_tables.backward(y, grids.table, table.shape, 1, "bilinear", True, False)


def _losses(new: Inputs) -> None:
    targets = torch.empty(LOGITS, device=new.device, dtype=torch.int64)
    loss_in_place(new.floats(LOGITS, VOCABULARY), targets, new.floats(LOGITS, dtype=torch.float32), True)


def _taps(new: Inputs) -> None:
    grids, x = new.grids(IMAGES[0]), new.floats(IMAGES[0], 1024)
    depthwise.taps_gradient(x, x, depthwise.Geometry(grids.table, grids.owner, grids.strips))


# Kernels without configurations, whose time is not predicted: (op, size, call)
FIXED: list[tuple[str, str, Callable[[Inputs], None]]] = [
    ("route", f"T={TOKENS} E={EXPERTS} K={K}", _route), ("patch_embed", "positions", _positions),
    ("conv_block", "taps", _taps), ("linear_cross_entropy", f"V={VOCABULARY}", _losses),
]  # fmt: skip


def measure(record: Record, ops: Sequence[str] = (), device: str = "h200") -> None:
    """Add and print a row for each kernel of these ops (default: all) and of peers.

    device: a GPU of NVIDIA in DEVICES. Raises UserError for an unknown op or device.
    """
    names = dict.fromkeys([*(case.op for case in CASES), *(op for op, *_ in FIXED)])
    if unknown := [op for op in ops if op not in names]:
        raise UserError(f"bench static: unknown op {unknown[0]!r}; known: {', '.join(names)}")
    if device not in DEVICES or DEVICES[device].vendor != "nvidia":
        nvidia = ", ".join(name for name, d in DEVICES.items() if d.vendor == "nvidia")
        raise UserError(f"bench static: device is {device!r}, expected one of {nvidia}")
    gpu = DEVICES[device]
    record.header["machine"] = f"static-{device}"
    record.rows = []  # nothing is measured, so that an earlier run has nothing to keep
    print(f"{'kernel':66} instr/MFLOP  issue tensor  share in loop regs   shared programs spills       µs")
    for row in rows(gpu, ops or list(names)):
        record.add(row)
        _show(row)


def rows(device: Device, ops: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of mm1's kernels, then those of peers; one without facts for a peer that is not installed."""
    seen = {name for kernel in KERNELS.values() for name in kernel.launched}  # those with configurations, then helpers
    for case in CASES:
        if case.op in ops:
            kernel, work = KERNELS[case.kernel], case.work(device)
            predicted = kernel.launched[: 1 if kernel.multiplies else None]
            for one in case.launches(device):
                if one.name in kernel.launched:
                    code = compile_launch(one, device)
                    yield _row(case.op, case.name, "mm1", code, device, work if one.name in predicted else None)
                elif one.name not in seen:
                    seen.add(one.name)
                    yield _row(case.op, case.name, "mm1", compile_launch(one, device), device)
    for op, name, call in FIXED:
        if op in ops:
            with recording(device) as recorded:
                call(Inputs("meta", DTYPE))
            for one in distinct(recorded):
                yield _row(op, name, "mm1", compile_launch(one, device), device)
    declare_operators()  # flash-linear-attention imports transformers
    for peer in PEERS:
        if peer.op in ops:
            yield from _peer_rows(peer, device)


def _peer_rows(peer: Peer, device: Device) -> Iterator[Row]:
    if importlib.util.find_spec(peer.module) is None:
        yield {"bench": "static", "op": peer.op, "case": "", "what": "", "mode": peer.name,
               "failed": {peer.name: "not installed"}}  # fmt: skip
        return
    for case, choices in peer.kernels(device):
        # The first candidate whose code is sound, as for mm1's predicted tables; the first of all if none is.
        tried = []
        for one, work in choices:
            tried.append((compile_launch(one, device), work))
            if not tried[-1][0].spills:
                break
        code, work = next((pair for pair in tried if not pair[0].spills), tried[0])
        yield _row(peer.op, case, peer.name, code, device, work)


def code_of(compiled: Compiled, work: Product | Rows) -> Code | None:
    """Return what the cost model takes from the machine code; None where its main loop is not a step of the work."""
    loop = compiled.loop
    if isinstance(work, Product):
        if not loop.flops:
            return None
        steps = loop.flops / work.operations  # of the model in one of the code, which may be unrolled
        return Code(compiled.registers, loop.instructions / steps, loop.ends)
    if loop.instructions and not loop.barriers:  # a loop over a window or over images
        return None
    return Code(compiled.registers, loop.instructions or loop.ends)


def _row(
    op: str, case: str, mode: str, compiled: Compiled, device: Device, work: Product | Rows | None = None
) -> Row:  # fmt: skip
    loop, warps = compiled.loop, compiled.warps
    issue = loop.instructions * warps / SCHEDULERS
    tensor = loop.flops * device.units * device.clock / (device.tflops * 1e12)
    facts: dict[str, Any] = {
        "registers": compiled.registers, "shared": compiled.shared, "spills": compiled.spills,
        "programs": resident(compiled.shared, max(compiled.registers, 16), warps, device),
        "issue": issue, "tensor": tensor, "barriers": loop.barriers,
    }  # fmt: skip
    if loop.flops:
        facts |= {"instructions": loop.instructions * warps / (loop.flops / 1e6), "share": tensor / max(issue, tensor)}
    if work:
        work = replace(work, shared=compiled.shared) if isinstance(work, Product) else work
        code = code_of(compiled, work)
        facts |= {"seconds": work.seconds(device, code), "bytes": work.moved}
        if isinstance(work, Product) and code:
            facts["in_loop"] = work.times(device, code).in_loop
    return {"bench": "static", "op": op, "case": case, "dtype": "bf16", "what": compiled.name, "mode": mode, **facts}


def _show(row: Row) -> None:
    name = f"{row['op']}: {row['mode']} {row['what']} {row['case']}"
    if why := row.get("failed"):
        print(f"{name.strip():66} {why[row['mode']]}", flush=True)
        return
    print(f"{name:66.66} {digits(row.get('instructions')):>11} {row['issue']:6.0f} {row['tensor']:6.0f} "
          f"{percent(row.get('share')):>6} {percent(row.get('in_loop')):>7} {row['registers']:4} {row['shared']:8} "
          f"{row['programs']:8} {row['spills']:6} {microseconds(row):>8}", flush=True)  # fmt: skip


def microseconds(row: Row) -> str:
    """Return the predicted time of a row's kernel, or an empty text where none is predicted."""
    return digits(1e6 * row["seconds"]) if "seconds" in row else ""
