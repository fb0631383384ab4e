"""Plans against counts by hand, torch's own cuts, and what autograd really keeps."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small import document, packed, small_model, small_run
from torch import nn

from mm1.engine.data.config import Data
from mm1.engine.data.document import DECODED_AHEAD, Document
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.record import Record
from mm1.engine.layers.decoder import Attention
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.workload import Layout, Workload
from mm1.engine.models.mm1 import MM1, parameter_counts
from mm1.engine.run_config import Run, load_run
from mm1.engine.train import checkpoint, command, host
from mm1.engine.train.config import Parallel, Train
from mm1.engine.train.display import Silent
from mm1.engine.train.ledger import ledger, workload
from mm1.engine.train.plan import HARDWARE, activations, fullest, memory, plan, shares, show, traffic, typical
from mm1.engine.train.recompute import recompute_blocks
from mm1.engine.train.trainer import train
from mm1.errors import UserError
from mm1.kernels.device import DEVICES

DENSE, MIXTURE = small_model(experts=0), small_model(experts=4, moe_every=1)


def run_of(model=DENSE, train=Train(accumulate=16), **parallel) -> Run:
    return Run(model, Data(tokens=160, images=4, patches=240), train, Parallel(**parallel))


def held(run: Run, gpus: int) -> int:
    return sum(s.stored for s in shares(run, gpus))


def elements(*parameters: nn.Parameter) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("name", ["mm1-7b", "mm1-3b-moe"])
def test_state_takes_16_bytes_of_every_parameter(name):
    run = load_run(name)
    counts = parameter_counts(run.model)
    everything = (
        sum(counts[part] for part in ("vision", "connector", "decoder")) + run.model.decoder.width
    )  # image norm
    found = plan(run, 1)
    assert found.parameters == everything
    assert sum(found.memory[part] for part in ("parameters", "gradients", "moments of AdamW")) == 16 * everything
    assert found.memory["gathered weights"] == 2 * everything, "autocast's copies in bf16"


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_shares_are_the_whole_when_put_together(model):
    whole = elements(*MM1(model).parameters())
    assert (
        2 * memory(run_of(model), 2, typical(run_of(model), 64))["parameters"] == 4 * whole
    )  # all first axes are even
    assert held(run_of(model, replicate=2), 4) == held(run_of(model), 2) == whole // 2
    assert held(run_of(model, tensor=2), 2) > whole // 2, "encoder and norms are on both"


def test_twice_the_gpus_hold_half_each():
    run = load_run("mm1-7b")
    assert held(run, 8) / held(run, 16) == pytest.approx(2, rel=3e-3)  # but tables of few rows
    assert held(replace(run, parallel=Parallel(replicate=2)), 16) == held(run, 8)


def test_the_fullest_gpu_holds_the_first_of_torchs_chunks():
    """As FSDP cuts: of a position table of 27 rows 27 of 64 GPUs have one; experts are cut across, and so evenly."""
    run, gpus = load_run("mm1-7b-moe"), 64
    with torch.device("meta"):
        across = lambda p: p.ndim == 3 and p.shape[1] % gpus == 0  # noqa: E731
        expected = [p.chunk(gpus, dim=int(across(p)))[0].numel() for p in MM1(run.model).parameters()]
    assert [s.stored for s in shares(run, gpus)] == expected
    assert 1 < plan(run, gpus).uneven < 1.01


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_tensor_halves_heads_and_mlps_and_nothing_else(model):
    modules = [*MM1(model).decoder.modules()]
    cut = sum(elements(m.qkv.weight, m.out.weight) for m in modules if isinstance(m, Attention))
    if model is DENSE:
        cut += sum(elements(*m.mlp.parameters()) for m in modules if hasattr(m, "mlp"))
    cut += sum(elements(m.gate_up, m.down) for m in modules if isinstance(m, Experts))
    one, two = (sum(s.used for s in shares(run_of(model, tensor=t), 2)) for t in (1, 2))
    assert one - two == cut // 2


def test_expert_cuts_experts_alone():
    experts = sum(elements(m.gate_up, m.down) for m in MM1(MIXTURE).modules() if isinstance(m, Experts))
    rest = elements(*MM1(MIXTURE).parameters()) - experts
    assert sum(s.used for s in shares(run_of(MIXTURE, expert=2), 2)) == rest + experts // 2
    assert held(run_of(MIXTURE, expert=2), 2) == held(run_of(MIXTURE), 2) == (rest + experts) // 2
    assert {(s.ranks, s.stride) for s in shares(run_of(MIXTURE, expert=2), 8)} == {(8, 1), (4, 2)}


def by_group(model) -> dict[str, int]:
    """Elements that are gathered together: of each block its matrices, and under "" all others."""
    groups = {"": 0} | {f"{part}.blocks.{i}": 0 for part in ("vision", "decoder") for i in range(2)}
    for name, p in MM1(model).named_parameters():
        block = ".".join(name.split(".")[:3])
        groups[block if block in groups and p.ndim > 1 and "router" not in name else ""] += p.numel()
    return groups


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_two_blocks_are_gathered_and_all_that_is_no_block(model):
    outside, *blocks = by_group(model).values()
    estimate = memory(run_of(model), 2, typical(run_of(model), 64))
    pairs = [a + b for a, b in pairwise(blocks)]
    assert estimate["gathered weights"] == 4 * outside + 2 * outside + 2 * max(pairs), "fp32, with bf16 copies; bf16"
    # Gradients in the dtype of the gathered weights, and copied to fp32.
    assert estimate["gradients being summed"] == max(8 * outside, *(6 * block for block in blocks))


def kept(model: MM1, batch) -> int:
    """Bytes of what autograd keeps, without weights and the gradient of the head's that waits there."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model(batch)
    head = 4 * model.decoder.head_weight.numel()
    assert losses.loss.requires_grad
    return sum(storage.nbytes() for at, storage in found.items() if at not in weights) - head


def wider(**decoder):
    """Wide enough that statistics of single rows, which no estimate counts, are little beside the rows."""
    c = small_model(**decoder)
    return replace(
        c, vision=replace(c.vision, width=64, ffn=160),
        decoder=replace(c.decoder, width=128, head_width=32, ffn=320, layers=4),
    )  # fmt: skip


CASES = {
    "dense": wider(experts=0),
    "mixture": wider(experts=4),
    "every layer a mixture": wider(experts=4, moe_every=1, experts_per_token=1),
    "quick_gelu, class token": replace(
        wider(experts=0), vision=replace(wider().vision, activation="quick_gelu", class_token=True, pre_norm=True)
    ),
    "average": replace(wider(experts=0), connector=replace(wider().connector, kind="average")),
    "attention": replace(wider(experts=0), connector=replace(wider().connector, kind="attention")),
}


@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_that_autograd_keeps(name):
    model = MM1(CASES[name]).init_weights()
    batch = packed([document((6, 6), 20, (8, 8), 30) for _ in range(4)])
    estimate = activations(CASES[name], workload(batch), Layout(4))
    # A CPU's RMSNorm keeps its normalised input as well, a GPU's does not.
    assert 0.75 < sum(estimate.values()) / kept(model, batch) < 1.1
    again = activations(CASES[name], workload(batch), Layout(4), recompute="blocks")
    recompute_blocks(model, "blocks")
    assert 0.75 < (sum(again.values()) - again["a block computed again"]) / kept(model, batch) < 1.25


def test_a_block_that_is_computed_again_is_the_largest():
    load = Workload([160], [], 160, 160, 0, 0)
    whole, again = (activations(DENSE, load, Layout(2), recompute=what) for what in ("none", "blocks"))
    assert again["a block computed again"] == whole["activations of blocks"] / DENSE.decoder.layers


def test_a_tensor_group_shares_what_lies_between_its_cuts():
    load = Workload([160], [], 160, 160, 0, 0)
    whole, half = (activations(DENSE, load, Layout(2, tensor=t))["activations of blocks"] for t in (1, 2))
    d = DENSE.decoder
    projections = (3 * 2 + 4) * (d.heads + d.kv_heads) * d.head_width + 2 * 4 * d.ffn  # bytes of a token, q and k fp32
    assert whole - half == d.layers * 160 * projections / 2


def test_tokens_that_travel_take_their_room():
    d, load = MIXTURE.decoder, Workload([160], [], 160, 160, 0, 0)
    layouts = (Layout(2, received=rows) for rows in (0.0, 1.5))
    stay, travel = (activations(MIXTURE, load, layout)["activations of blocks"] for layout in layouts)
    slots = 160 * d.experts_per_token * d.layers
    # Half as many products again, the rows that are taken in, and in fp32 the results that come back.
    assert travel - stay == slots * (0.5 * 2 * 2 * d.ffn + 1.5 * 2 * d.width + 4 * d.width)
    rows = 320 * (1 + 1.5)  # in the experts' order and taken in, and as many results
    assert memory(run_of(MIXTURE, expert=2), 2, load, 1.5)["tokens sent to experts"] == 2 * rows * 2 * d.width
    assert not memory(run_of(MIXTURE), 2, load, 1.5)["tokens sent to experts"]


def test_a_step_takes_as_long_as_its_operations():
    run = load_run("mm1-1b", ["train.recompute=blocks"])
    counted = ledger(run.model, typical(run, 1024), recompute="blocks")
    found = plan(run, 1, "h100", share=0.5)
    assert found.operations == 512 * counted.totals()["useful"]
    assert found.seconds["operations"] == pytest.approx(512 * counted.executed / (0.5 * 989e12))
    assert found.seconds["AdamW"] == pytest.approx(28 * found.parameters / 3352e9)
    assert found.step == sum(found.seconds.values())
    assert found.mfu == pytest.approx(counted.mfu(found.step / 512, 989e12))
    assert found.tokens_per_second == pytest.approx(512 * 4096 / found.step)
    waits = 200 * found.checkpoint.waited  # one every 1,000 steps
    assert found.days == pytest.approx((200_000 * found.step + waits) / 86_400)
    assert found.checkpoint.share == pytest.approx(waits / (200_000 * found.step + waits))


def test_a_tensor_group_repeats_all_but_the_decoders_layers():
    run = load_run("mm1-1b")
    parts = ledger(run.model, typical(run, 1024))
    cut = sum(sum(kind.get(part, 0) for kind in (parts.forward, parts.backward, parts.recompute))
              for part in ("decoder linear", "decoder attention"))  # fmt: skip
    one, two = (plan(replace(run, parallel=Parallel(tensor=t)), 2, share=0.4).seconds["operations"] for t in (1, 2))
    assert two / one == pytest.approx(2 * (parts.executed - cut / 2) / parts.executed)


def test_what_fsdp_sends():
    """Of two GPUs each receives the other half: bf16 twice (of all but matrices fp32 once), and fp32 gradients once."""
    outside, *blocks = by_group(DENSE).values()
    load = typical(run_of(), 64)
    expected = (2 * 2 * sum(blocks) + 4 * outside + 4 * (sum(blocks) + outside)) / 2
    assert traffic(run_of(), 2, load, 1.0, 1.0)["FSDP"] * 0.8e9 == pytest.approx(expected)
    copies = 8 * (sum(blocks) + outside) / 2 / 2  # to and from the other pair, half of their half each
    assert traffic(run_of(replicate=2), 4, load, 1.0, 1.0)["FSDP"] * 0.8e9 == pytest.approx(expected + copies)
    assert traffic(run_of(), 1, load, 1.0, 1.0) == {"FSDP": 0, "tensor": 0, "expert": 0}


def test_groups_that_leave_the_node_are_as_fast_as_all_their_ports():
    """16 GPUs in a ring use eight ports a node; pairs in tensor groups have four; neighbours never leave."""
    times = {}
    for network in (1, 50, 1000):
        times[network] = [
            traffic(run_of(**way), 16, typical(run_of(), 64), 450.0, network) for way in ({}, {"tensor": 2})
        ]
    assert times[1][0]["FSDP"] / times[1000][0]["FSDP"] == pytest.approx(450 / 8)
    assert times[50][0]["FSDP"] / times[1000][0]["FSDP"] == pytest.approx(450 / 400)
    assert times[50][1]["FSDP"] / times[1000][1]["FSDP"] == pytest.approx(450 / 200)
    assert times[1][1]["tensor"] == times[1000][1]["tensor"] > 0


@pytest.mark.parametrize("recompute", ["none", "selective", "blocks"])
def test_what_tensor_and_expert_parallelism_send(recompute):
    train, passes = Train(accumulate=16, recompute=recompute), 3 if recompute == "blocks" else 2
    load = Workload([160], [], 160, 160, 0, 0)
    x = 2 * 160 * 32  # bytes of the hidden state; two layers, each of them with two sums a pass
    sums = traffic(run_of(DENSE, train, tensor=2), 2, load, 1.0, 1.0)["tensor"]
    assert sums * 0.8e9 == pytest.approx(passes * 2 * 2 * x)
    # There and back; two choices a token, of which half go to the other, and 1.5 times as many to the fullest.
    sent = traffic(run_of(MIXTURE, train, expert=2), 2, load, 1.0, 1.0, 1.5)["expert"]
    assert sent * 0.8e9 == pytest.approx(passes * 2 * 2 * x * 2 * 1.5 / 2)
    many = run_of(small_model(experts=16, moe_every=1), train, expert=16)
    far = traffic(many, 16, load, 450.0, 50.0, 1.5)["expert"]  # half of the peers are in the other node, on one port
    assert far * 0.8 * 50e9 == pytest.approx(passes * 2 * 2 * x * 2 * 1.5 / 2)


def test_only_what_is_longer_of_operations_and_fsdp_counts():
    for network in (0.1, 400.0):
        found = plan(load_run("mm1-7b"), 16, network=network)
        both = found.seconds["operations"], found.seconds["FSDP"]
        assert found.step == pytest.approx(max(both) + found.seconds["AdamW"])
        assert (both[1] > both[0]) == (network < 1)


def test_what_does_not_fit_says_what_would():
    run = load_run("mm1-30b")
    found = plan(run, 8, "h100")
    assert sum(found.memory.values()) > found.usable
    assert found.remedies
    for text in found.remedies:
        changes = text.split(", ")
        gpus = next((int(c.removesuffix(" GPUs")) for c in changes if c.endswith(" GPUs")), 8)
        other = plan(load_run("mm1-30b", [c for c in changes if "=" in c]), gpus, "h100")
        assert sum(other.memory.values()) <= other.usable
        assert f"would fit: {text}" in show(found)
    assert "does not fit" in show(found)
    assert "no tried change of settings fits" in show(plan(run, 1, "rtx4090"))
    assert not plan(load_run("mm1-7b"), 8).remedies


def test_every_part_and_assumption_is_shown():
    found = plan(load_run("mm1-7b-moe", ["parallel.expert=32"]), 64)
    text = show(found)
    for line in (
        *found.assumptions,
        "48,017 M",
        "25% of 989 TFLOP/s",
        "450 GB/s",
        "expert parallelism",
        "tokens sent to experts",
        "documents of 1024",
        "1.25 × the mean",
        "reading back for checksums",
        "host memory of a node",
    ):
        assert line in text
    assert "tensor parallelism" not in text, "there is none"
    assert json.loads(json.dumps(dataclasses.asdict(found)))["memory"] == found.memory


def test_the_devices_are_those_of_the_kernels():
    assert HARDWARE.keys() == DEVICES.keys()


@pytest.mark.parametrize(
    "settings, gpus, words",
    [
        (["parallel.tensor=2"], 3, "settings parallel.replicate 1 × parallel.tensor 2 do not divide 3 GPUs"),
        (["parallel.replicate=4"], 2, "parallel.replicate 4 × parallel.tensor 1 do not divide 2 GPUs"),
        ([], 0, "do not divide 0 GPUs"),
        ([], -8, "do not divide -8 GPUs"),
        (["parallel.expert=3"], 4, "parallel.expert is 3, expected a divisor of the 4 GPUs that shard"),
        (["parallel.expert=64"], 64, "parallel.expert is 64, expected a divisor of the 32 experts"),
        (["parallel.expert=2", "model.decoder.experts=0"], 4, "parallel.expert is 2, expected 1 for a model without"),
        (["parallel.tensor=16"], 16, "parallel.tensor is 16, expected a divisor of the 8 kv_heads"),
        (["parallel.tensor=2", "parallel.expert=2"], 4, "both above 1"),
        (["train.accumulate=12"], 8, "train.accumulate is 12, expected a multiple of the 8"),
        (["data.streams=12"], 8, "data.streams is 12, expected a multiple of the 8"),
        (["train.dtype=fp32"], 8, "train.dtype is 'fp32'"),
        (["data.tokens=100"], 8, "data.tokens is 100, expected 146 or more, for one image"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(settings, gpus, words):
    with pytest.raises(UserError) as error:
        plan(load_run("mm1-7b-moe", settings), gpus)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rates, words",
    [
        ({"device": "abacus"}, "device is 'abacus', expected one of a100"),
        ({"share": 0.0}, "share of peak is 0.0"),
        ({"share": 1.5}, "share of peak is 1.5"),
        ({"network": 0.0}, "network is 0.0, expected above 0"),
        ({"document": 0}, "document is 0, expected above 0"),
        ({"storage": -1.0}, "storage is -1.0, expected above 0"),
        ({"storage": math.nan}, "storage is nan"),
        ({"host_memory": 0.0}, "host memory is 0.0, expected above 0"),
        ({"imbalance": 0.9}, "imbalance is 0.9, expected 1 or more"),
        ({"imbalance": math.inf}, "imbalance is inf"),
    ],
    ids=str,
)
def test_rates_that_cannot_be_are_refused(rates, words):
    with pytest.raises(UserError, match=words):
        plan(run_of(), 1, **rates)


def test_images_fill_no_more_than_the_tokens():
    load = typical(Run(DENSE, Data(tokens=10, images=9, patches=90)), 4)
    assert (list(load.documents), len(load.grids), load.targets) == ([4, 4, 2], 2, 2)  # of four tokens each
    assert math.prod(load.grids[0]) == 10
    assert (load.images, load.patches) == (9, 90), "the budgets are computed all the same"


def test_longer_documents_take_the_operations_of_their_pairs():
    run, c = load_run("mm1-1b"), load_run("mm1-1b").model.decoder
    short, long = (plan(run, 8, document=n) for n in (512, 4096))
    pairs = (4096 * 4097 - 8 * 512 * 513) // 2
    assert long.operations - short.operations == 512 * 3 * c.layers * 4 * c.heads * c.head_width * pairs
    assert long.step > short.step
    assert "documents of 512" in show(short)


def test_the_fullest_process_is_bounded_by_its_group_and_by_an_explicit_capacity():
    assert fullest(run_of(MIXTURE, expert=2), 1.5) == 1.5
    assert fullest(run_of(MIXTURE, tensor=2), 1.5) == 1.5
    assert fullest(run_of(MIXTURE, expert=2), 5.0) == 2.0, "both have twice the mean at most"
    assert fullest(run_of(MIXTURE, expert=4, capacity=1.1), 1.5) == 1.1
    assert fullest(run_of(MIXTURE, tensor=2, capacity=1.1), 1.5) == 1.1
    assert fullest(run_of(MIXTURE, expert=2, capacity=0.5), 1.5) == 1.0, "the mean is what is planned"
    assert fullest(run_of(MIXTURE), 1.5) == fullest(run_of(DENSE, tensor=2), 1.5) == 1.0, "nobody shares experts"


@pytest.mark.parametrize("way", [{"expert": 4}, {"tensor": 4}], ids=str)
def test_more_imbalance_is_never_faster_nor_smaller(way):
    run = replace(load_run("mm1-7b-moe"), parallel=Parallel(**way))
    plans = [plan(run, 8, imbalance=load) for load in (1.0, 1.2, 1.6, 1.9)]
    for less, more in pairwise(plans):
        assert more.step > less.step
        assert all(more.memory[part] >= less.memory[part] for part in more.memory)
        assert more.seconds["expert"] > less.seconds["expert"] or "tensor" in way
        assert more.operations == less.operations, "what is useful stays"
    # Operations of the experts, and nothing else, grow with it.
    counted = ledger(run.model, typical(run, 1024))
    experts = sum(kind.get("experts", 0) for kind in (counted.forward, counted.backward, counted.padding))
    grown = (plans[2].seconds["operations"] - plans[0].seconds["operations"]) * 0.25 * 989e12
    assert grown == pytest.approx(0.6 * 512 / 8 * experts)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_of_one_process_is_as_large_as_planned(tmp_path):
    run = small_run(steps=1, save_every=1)
    train(run, tmp_path, display=Silent())
    assert plan(run, 1).checkpoint.size == pytest.approx(size(checkpoint.latest(tmp_path)), rel=0.02)


@pytest.mark.slow  # starts two processes of torchrun
def test_a_checkpoint_of_two_processes_is_as_large_as_planned_and_so_is_its_copy(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    script = [str(Path(__file__).with_name("saved_run.py")), str(tmp_path)]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    estimate = plan(small_run(accumulate=4, steps=1, save_every=1), 2)
    assert estimate.checkpoint.size == pytest.approx(size(checkpoint.latest(tmp_path)), rel=0.02)
    staged = sum(json.loads((tmp_path / f"staged-{rank}.json").read_text()) for rank in (0, 1))
    assert estimate.host["copy of the checkpoint"] == pytest.approx(staged, rel=0.02)


def test_one_process_waits_for_all_of_a_save():
    saved = host.checkpoint(
        Train(steps=100, save_every=10, keep=3), 1, parameters=10**9, stored=10**9, tensors=0, step=2.0, storage=1e9
    )  # fmt: skip
    assert saved.size == saved.process == pytest.approx(12e9, rel=1e-4)
    assert saved.disk == 4 * saved.size, "three, and one being written"
    # 12 GB at 3 GB/s, at 1 GB/s, and back again at 1 GB/s.
    assert [*saved.seconds.values()] == pytest.approx([4, 12, 12], rel=1e-4)
    assert saved.waited == pytest.approx(28, rel=1e-4)
    assert saved.share == pytest.approx(280 / 480, rel=1e-4), "ten saves, 200 seconds of steps"


def test_many_processes_write_beside_the_steps():
    def save(step, storage):
        t = Train(steps=100, save_every=10)
        return host.checkpoint(t, 16, parameters=10**9, stored=10**9 // 16, tensors=0, step=step, storage=storage)

    slow, fast = save(0.1, 1e9), save(1.0, 1e9)
    assert fast.seconds["copying to host memory"] == pytest.approx(0.25)
    assert fast.seconds["writing"] == pytest.approx(6, rel=1e-4), "two nodes write"
    assert fast.seconds["reading back for checksums"] == pytest.approx(6, rel=1e-4), "and read"
    assert save(2.0, 1e9).waited == pytest.approx(0.25), "for the copy alone, as 12 of 20 seconds are used"
    assert fast.waited == pytest.approx(2.25, rel=1e-3), "ten steps of a second hide ten of twelve seconds"
    assert slow.waited == pytest.approx(11.25, rel=1e-3)
    waits = [save(0.1, storage).waited for storage in (1e9, 2e9, 10e9, 1e12)]
    assert waits == sorted(waits, reverse=True)
    hashed = save(0.1, 1e12).seconds["reading back for checksums"]
    assert hashed == pytest.approx(0.5, rel=1e-3), "SHA-256 of 0.75 GB at 1.5 GB/s, however fast storage is"


def test_host_memory_of_a_node():
    """By hand: 16 GPUs in two nodes, a sequence of 160 tokens with four images of 60 patches of 4 × 4 pixels."""
    run = Run(DENSE, Data(tokens=160, images=4, patches=240, streams=32, workers=3, buffer=1600), Train(accumulate=16))
    load, pixels = typical(run, 80), 4 * 60 * 4 * 4 * 3
    token = pixels / 160 + 4
    assert host.memory(run, 16, load, stored=1000) == {
        "training processes": 8 * 3e9,
        "copy of the checkpoint": 8 * 12 * 1000,
        "loader processes": 8 * 2 * 3 * 0.2e9,
        "documents decoded ahead": 8 * 2 * 3 * 64 * 80 * token,
        "documents waiting in packers": 8 * 2 * 1600 * token,
        "batches": 8 * 2 * 3 * 160 * token,
    }
    alone = host.memory(replace(run, data=replace(run.data, streams=1)), 1, load, stored=1000)
    assert alone["copy of the checkpoint"] == 8 * 1000, "of one file, of which the optimizer's is the larger"
    assert alone["documents waiting in packers"] == 1600 * token
    text = show(plan(run, 16, host_memory=100))
    assert "fits in 100" in text
    assert "does not fit in 0.001" in show(plan(run, 16, host_memory=0.001))


class Counted:
    """A source that counts the records that are read."""

    read = 0

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        self.read += 1
        return Record(("text",), str(index), "shard")


def test_as_many_documents_are_decoded_ahead_as_planned():
    source, one = Counted(), [Document(torch.zeros(4, dtype=torch.int32).numpy(), (), "")]
    stream = Mixture([source], [1.0], lambda record: one, 0, [4.0]).iterate(0, 0)
    for _ in range(200):
        next(stream)
    deadline = time.monotonic() + 10
    while source.read < 200 + DECODED_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 200 + DECODED_AHEAD <= source.read <= 200 + DECODED_AHEAD + 1


def test_the_command_takes_every_rate(capsys):
    command.plan(
        "mm1-7b-moe", gpus=16, set=("parallel.expert=16",), document=2048, imbalance=1.4, storage=20.0,
        host_memory=2000.0,
    )  # fmt: skip
    *_, last = capsys.readouterr().out.splitlines()
    run = load_run("mm1-7b-moe", ["parallel.expert=16"])
    other = plan(run, 16, document=2048, imbalance=1.4, storage=20.0, host_memory=2000.0)
    assert json.loads(last) == json.loads(json.dumps(dataclasses.asdict(other)))
