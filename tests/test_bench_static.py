"""mm1 bench static reports each kernel's machine code, and that of other libraries where they are installed."""

from collections import Counter
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import mostly_slow

from mm1.autotune.machine_code import Loop
from mm1.autotune.static import Compiled
from mm1.bench import static
from mm1.bench.comparison import gather
from mm1.bench.readme import tables
from mm1.bench.record import Record, read
from mm1.bench.static_peers import LIGER, Peer, recorded
from mm1.kernels.cost_model import Code, Product, Rows
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import Launch

H200 = DEVICES["h200"]


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128)], key=["N"])
@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < N) * 2, at < N)


def doubled(device):
    """Yield the kernel of a made-up library, which reads a value of a tensor before it launches."""
    x = torch.empty(1000, device="meta", dtype=torch.bfloat16)
    with recorded() as launches:
        double_kernel[(int(x[0].item()),)](x, torch.empty_like(x), N=1000)
    ((kernel, arguments),) = launches
    assert list(arguments) == ["x_ptr", "y_ptr", "N"]
    candidates = ((Launch(kernel.fn, 1, arguments | config.kwargs | {"num_warps": 4}), None)
                  for config in kernel.configs)  # fmt: skip
    yield "doubling", candidates


@pytest.mark.parametrize("case", static.CASES, ids=lambda case: f"{case.kernel}, {case.name}")
def test_each_case_has_work_and_launches(case):
    assert case.work(H200).moved > 0
    assert case.launches(H200)


@pytest.mark.parametrize("op", mostly_slow("linear_cross_entropy", *dict.fromkeys(case.op for case in static.CASES)))
def test_each_op_has_rows_for_its_kernels_and_those_of_peers(op, tmp_path, monkeypatch, capsys):
    peers = [Peer("made up", op, "triton", doubled), Peer("absent", op, "no_such_module", doubled)]
    monkeypatch.setattr(static, "PEERS", peers)
    path = tmp_path / "x.json"
    static.measure(Record(path), [op])
    rows = read(path)["rows"]
    ours = [row for row in rows if row["mode"] == "mm1"]
    assert len({(row["what"], row["case"]) for row in ours}) >= len({c.name for c in static.CASES if c.op == op})
    for row in ours:
        assert row["spills"] == 0
        assert row["registers"] > 0 < row["programs"]
        assert row["issue"] >= 0
        if row["tensor"]:
            assert row["instructions"] > 0
            assert 0 < row["share"] <= 1
    assert [row["what"] for row in rows if row["mode"] == "made up"] == ["double_kernel"]
    assert rows[-1]["failed"] == {"absent": "not installed"}
    printed = capsys.readouterr().out
    assert f"{op}: made up double_kernel doubling" in printed
    assert "not installed" in printed
    page = tables(f"<!-- table: static static-h200 {op} -->\n<!-- end -->\n", gather([path]))
    assert page.count("\n| ") == len(rows) - 1 + 2  # with the head and its rule
    assert "Compiled for h200 by Triton" in page
    assert "Not compiled: absent: not installed." in " ".join(page.split())


def test_an_instruction_counts_by_the_step_of_the_model():
    """A loop that is unrolled once has half its instructions in each step."""
    work = Product(tiles=1, depth=160, m=128, n=64, k=80, warps=8, stages=3, shared=0, moved=1, itemsize=2)
    facts: dict[str, Any] = {"name": "x", "warps": 8, "registers": 100, "spills": 0, "stack": 0, "shared": 0, "code": 0,
             "instructions": Counter()}  # fmt: skip
    loop = Loop(instructions=361, flops=2 * 2 * 128 * 64 * 80, ends=700)
    assert static.code_of(Compiled(**facts, loop=loop), work) == Code(100, 180.5, 700)
    rows = Rows(1000, 1024, 1, 3, 10, 4, 2, 2)
    assert static.code_of(Compiled(**facts, loop=Loop(638, 0, 12, 255)), rows) == Code(100, 638)
    assert static.code_of(Compiled(**facts, loop=Loop(ends=400)), rows) == Code(100, 400)
    assert static.code_of(Compiled(**facts, loop=Loop(117, 0, 0, 134)), rows) is None  # a loop over windows


def test_a_peers_products_have_the_operations_of_the_op():
    """Forward is 6·T·K·D·F operations, and backward twice as many, whatever the tile."""
    T, K, D, F = static.TOKENS, static.K, static.WIDTH, static.FFN
    total = {}
    for sizes in LIGER.values():
        work = sizes.work(128, 128, 64, 8, 3)
        rows = static.EXPERTS * sizes.rows or T * K
        total[sizes.case] = 2 * rows * sizes.columns * sizes.sums * work.depth
        assert work.tiles * work.m * work.n >= rows * sizes.columns * sizes.sums
    assert total["up"] + total["down"] == 6 * T * K * D * F
    assert total["dh"] + total["dx"] + total["dgate_up"] + total["ddown"] == 12 * T * K * D * F


def test_the_record_names_the_gpu_and_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "CASES", [])
    monkeypatch.setattr(static, "PEERS", [Peer("absent", "route", "no_such_module", doubled)])
    monkeypatch.setattr(static, "FIXED", [("route", "none", lambda new: None)])
    record = Record(tmp_path / "x.json")
    static.measure(record, ["route"], "b200")
    assert record.header["machine"] == "static-b200"
    assert len(record.rows) == 1
    static.measure(Record(tmp_path / "x.json"), ["route"], "b200")  # again, over the first
    assert len(read(tmp_path / "x.json")["rows"]) == 1
