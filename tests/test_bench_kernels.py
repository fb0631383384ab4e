"""Each op is right before it is timed, a wrong peer is not timed but gives a reason, no time beats the machine."""

import ast
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mm1.autotune.space import Inputs
from mm1.bench import image_sizes, kernels, ops
from mm1.bench.kernels import Bench
from mm1.bench.ops import OPS
from mm1.bench.peers import PEERS, Peer, Way, missing
from mm1.bench.record import Record, file, read, without_samples
from mm1.bench.roofline import floor, impossible
from mm1.bench.run import ROOT, TESTS, backends, run
from mm1.errors import UserError
from mm1.kernels.dispatch import Cost

LIMITS = {"copy": 1e10, "gemm": {"fp32": 1e11, "bf16": 1e11}}
TINY = {
    "moe_mlp": ("tiny", 12), "grouped_gemm": (20, 3, 16, 24), "route": (20, 8, 2), "patch_embed": ("native", 2, 16),
    "embed_patches": ("budget", 2, 16), "qwen_embed": ("native", 2, 16),
    "patch_loss": ("native", 2, 16),
    "conv_block": ("mixed", 2, 16), "c_abstractor": ("mixed", 2, 16),
    "adaptive_pool": ("mixed", 2, 16), "attention": (3, 20, 4, 2, 16, True),
    "paged_attention": (3, 20, 40, 4, 2, 16), "linear_cross_entropy": (20, 16, 64),
}  # fmt: skip
PRESENT = [peer for peer in PEERS if missing(peer, "cpu") is None and peer.name not in ("compiled", "max-autotune")]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(ops.LAYERS, "tiny", ops.Layer("tiny", 32, 48, 4, 2))
    monkeypatch.setattr(image_sizes, "NATIVE", [(5, 3), (2, 7)])
    for op, sizes in TINY.items():
        monkeypatch.setitem(OPS[op].cases["cpu"], "tiny", sizes)


@pytest.mark.parametrize("op", OPS)
def test_every_op_and_every_peer_that_is_here_gives_what_wide_arithmetic_gives(op):
    bench = Bench(op, "tiny", "cpu", "fp32", PRESENT, LIMITS)
    assert bench.failed == {}
    assert set(bench.ways) == {"mm1", *(peer.name for peer in PRESENT if op in peer.ways)}
    assert bench.errors["mm1"] < 1e-5
    row, *more = bench.rows(0.0)
    assert len(more) == OPS[op].backward
    assert set(row["variants"]) == {*bench.ways, "mm1 again"}
    assert all(found["ratio"]["n"] >= 7 for name, found in row["variants"].items() if not name.startswith("mm1"))


def way(run):
    return Peer(
        "peer", {"linear_cross_entropy": lambda problem: Way(lambda leaves: run(problem, leaves), problem.leaves)}
    )


@pytest.mark.parametrize(
    "run, why",
    [
        (lambda p, w: p.plain(w) * 1.01, "wrong by"),
        (lambda p, w: p.plain(w) + 0 * w["x"].sum() + (w["x"] - w["x"].detach()).sum(), "wrong by"),  # its gradient
        (lambda p, w: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda p, w: F.linear(w["x"], w["weight"]), "RuntimeError"),
    ],
)
def test_a_peer_that_is_wrong_or_fails_is_told_and_not_timed(run, why):
    bench = Bench("linear_cross_entropy", "tiny", "cpu", "fp32", [way(run)], LIMITS)
    rows = list(bench.rows(0.0))
    assert all("peer" not in row["variants"] and why in row["failed"]["peer"] for row in rows)


def replace_route(monkeypatch, change):
    """Replace mm1's implementation of route by the plain one, with a change to its result."""

    def problem(*sizes):
        right = ops.route(*sizes)
        return replace(right, ours=lambda leaves: change(right.plain(leaves)))

    monkeypatch.setitem(OPS, "route", OPS["route"]._replace(problem=problem))


def test_this_project_wrong_is_a_failure_and_no_figure(monkeypatch):
    replace_route(monkeypatch, lambda result: result * 1.001)
    record = Record()
    assert not kernels.measure(record, ["route"], shapes=["tiny"], budget=0.0)
    assert "mm1" not in record.rows[0]["variants"]
    assert record.rows[0]["failed"]["mm1"].startswith("wrong by")


def test_results_that_change_while_they_are_timed_are_a_failure(monkeypatch):
    calls = []

    def flaky(result):
        calls.append(0)
        return result * (1 if len(calls) < 5 else 1.01)

    replace_route(monkeypatch, flaky)
    row = next(iter(Bench("route", "tiny", "cpu", "fp32", [], LIMITS).rows(0.0)))
    assert row["failed"] == {"mm1": "results changed while they were timed"}


def test_the_floor_is_the_longer_of_operations_and_bytes_and_what_is_faster_is_impossible():
    assert floor(Cost(10**11, 10**9), "fp32", LIMITS) == pytest.approx(1.0)
    assert floor(Cost(10**9, 10**11), "fp32", LIMITS) == pytest.approx(10.0)
    assert impossible(9.0, Cost(10**9, 10**11), "fp32", LIMITS, l2=0)
    assert not impossible(9.0, Cost(10**9, 10**11), "fp32", LIMITS, l2=2 * 10**10)  # what was written last stays there
    assert not impossible(11.0, Cost(10**9, 10**11), "fp32", LIMITS, l2=0)


@pytest.mark.parametrize("op", OPS)
def test_costs_are_those_of_the_shape_and_of_both_directions(op):
    problem = OPS[op].problem(Inputs("cpu", torch.float32), *TINY[op])
    forward, backward = problem.costs
    read_and_written = sum(leaf.nbytes for leaf in problem.leaves.values())
    assert backward.flops >= forward.flops > 0
    assert forward.bytes > 0.5 * read_and_written or op == "moe_mlp"


@pytest.mark.parametrize("op", ["adaptive_pool", "paged_attention"])
def test_a_record_goes_on_where_it_was_and_knows_what_a_process_died_over(op, tmp_path):
    path = tmp_path / "results.json"
    record = Record(path)
    assert kernels.measure(record, [op], shapes=["tiny"], budget=0.0)
    again = Record(path)
    assert again.rows == record.rows
    kernels.measure(again, [op], shapes=["tiny"], budget=0.0)
    assert again.rows == record.rows
    path.write_text(json.dumps({**read(path), "now": {"bench": "kernels", "op": "route"}}))  # as a killed one leaves
    assert Record(path).rows[-1]["failed"] == {"mm1": "the process died"}
    assert "now" not in read(path)
    assert "samples" in record.rows[0]["variants"]["mm1"]
    assert "samples" not in without_samples(record.rows[0])["variants"]["mm1"]


def test_records_go_to_the_working_directory_and_tables_only_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file().parts[0] == "bench-results"
    path = run(seconds=0.0)
    assert path.is_relative_to(tmp_path / "bench-results")
    assert path.suffix == ".json"
    assert run(tmp_path / "x.json", seconds=0.0, tables=tmp_path / "tables") == tmp_path / "x.json"
    assert not list(tmp_path.iterdir()), "nothing was measured, so nothing is written"


def test_every_test_of_kernels_that_a_gpu_runs_is_listed():
    """Those of integrations are not: they need other packages, and interpreting kernels in whole models takes hours."""

    def runs_on_a_gpu(path):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {name.name for node in imports if (node.module or "").endswith("conftest") for name in node.names}
        modules = {node.module for node in imports}
        return names & {"DEVICE", "needs_gpu"} and not any("integrations" in str(module) for module in modules)

    listed = TESTS.read_text().split()
    assert len(listed) == len(set(listed))
    assert all((ROOT / path).is_file() for path in listed)
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if runs_on_a_gpu(path)} <= set(listed)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [1]}', '{"header": {}, "rows": [{}]}'])
def test_a_file_that_is_no_record_is_told(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not a record"):
        Record(tmp_path / "x.json")


def test_results_of_another_commit_are_not_gone_on_with(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"header": {"commit": "abc"}, "rows": []}')
    with pytest.raises(UserError, match=r"commit of .*x\.json is abc, expected"):
        Record(path)


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"ops": ["softmax"]}, "unknown op 'softmax'"), ({"dtype": "fp64"}, "unknown dtype 'fp64'"),
        ({"peers": ["cudnn"]}, "unknown peer 'cudnn'"), ({"shapes": ["T=7"]}, "no case has T=7 in its name"),
    ],
)  # fmt: skip
def test_unknown_names_are_told(arguments, why):
    with pytest.raises(UserError, match=why):
        kernels.measure(Record(), **arguments)


def test_attention_backends_are_shares_of_the_peak():
    def row(what, seconds, flops):
        shape = {"width": 80, "causal": 0}
        return {"op": "attention", "mode": "stream", "dtype": "bf16", "what": what, "shape": shape, "flops": flops,
                "variants": {"varlen": {"median": seconds}, "mm1": {"median": 1.0}}}  # fmt: skip

    rows = [row("forward", 1.0, 2e10), row("forward+backward", 3.0, 7e10), row("forward", 9.0, 2e10)]
    assert backends(rows, LIMITS["gemm"]) == [
        {"head_width": 80, "causal": False, "dtype": "bfloat16", "backend": "varlen", "forward": 0.2, "backward": 0.25}
    ]
