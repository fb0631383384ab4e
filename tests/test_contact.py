"""The first contact with a GPU, here with a CPU: everything is checked, and nothing ends at the first failure."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm1.bench.checks import (
    CHECKS,
    SMALL,
    Context,
    Wrong,
    attention_cases,
    compare,
    masked_attention,
    op_cases,
)
from mm1.bench.contact import Process, contact, examine
from mm1.bench.ops import OPS
from mm1.bench.record import Record, read
from mm1.kernels.attention import Causal, Full
from mm1.kernels.attention.reference import attention
from mm1.kernels.fallback import remember, remembered

BAD = [sys.executable, str(Path(__file__).with_name("contact_checks.py"))]


def test_errors_deaths_and_hangs_cost_one_case_each(tmp_path, capsys):
    record = Record(tmp_path / "record.json")
    assert not contact(record, ["errors", "deaths", "hangs"], jobs=3, patience=3, command=BAD)
    rows = read(tmp_path / "record.json")["rows"]
    status = {(row["op"], row["case"]): row["status"] for row in rows}
    assert status == {
        ("errors", "a"): "right", ("errors", "b"): "wrong", ("errors", "c"): "failed", ("errors", "d"): "right",
        ("deaths", "a"): "right", ("deaths", "b"): "died", ("deaths", "c"): "died", ("deaths", "d"): "right",
        ("hangs", "a"): "hung", ("hangs", "b"): "right",
    }  # fmt: skip
    trace = {(row["op"], row["case"]): row.get("traceback", "") for row in rows}
    assert "in failing" in trace["errors", "c"]
    assert "illegal memory access" in trace["deaths", "b"]
    assert "no kernel image is available" in capsys.readouterr().out


def test_the_search_for_whom_to_blame_is_no_hang(tmp_path):
    """It repeats the case for each op; together the attempts take longer than a case may take."""
    assert not contact(record := Record(), ["whole"], patience=3, command=BAD)
    assert [(row["case"], row["status"], row["blamed"]) for row in record.rows] == [
        ("slow", "wrong", [["bad", "float32"]])
    ]


def test_later_runs_avoid_the_ops_to_blame(tmp_path, monkeypatch, capsys):
    """An op is to blame without whose kernels the case is right, or that ran when the process ended."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    assert not examine("cpu", checks=["ops"], command=BAD, patience=3, out=tmp_path)
    (path,) = tmp_path.glob("*/contact-*.json")
    rows = read(path)["rows"]
    assert {row["case"]: (row["status"], [name for name, _ in row.get("blamed", [])]) for row in rows} == {
        "sound": ("right", []), "bad": ("wrong", ["bad"]), "both": ("wrong", ["worse", "sound", "bad"]),
        "raises": ("failed", ["raises"]), "neither": ("wrong", []), "breaks": ("failed", ["breaks"]),
        "after": ("right", []), "hangs": ("hung", ["hangs"]),
    }  # fmt: skip
    why = remembered()
    assert {name for _, name, _ in why} == {"bad", "worse", "sound", "raises", "breaks", "hangs"}
    assert why["cpu", "bad", "float32"] == "ops bad was wrong (Wrong: y is 10.0)"
    assert "bad (float32) will run in plain torch: ops bad was wrong" in capsys.readouterr().out


def test_without_time_for_all_checks_earlier_findings_remain(tmp_path, monkeypatch):
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    remember("cpu", {("bad", "float32"): "y by 1"})
    assert not examine("cpu", checks=["hangs"], seconds=0.1, command=BAD, out=tmp_path)
    assert [*remembered()] == [("cpu", "bad", "float32")]


def test_what_has_no_time_is_recorded_as_not_run(tmp_path):
    record = Record()
    assert not contact(record, ["hangs", "errors"], seconds=0.5, jobs=1, command=BAD)
    assert {row["status"] for row in record.rows} == {"not run"}
    assert {row["op"] for row in record.rows} == {"hangs", "errors"}


@pytest.mark.parametrize(("status", "blamed"), [("hung", [["stuck", "float32"]]), ("not run", [])])
def test_the_op_that_ran_is_to_blame_for_a_hang_and_not_for_the_end_of_time(status, blamed, tmp_path):
    process = Process(BAD, "op hangs", tmp_path)
    while not process.ops:
        assert process.process.poll() is None
        assert not [*process.results()]
        time.sleep(0.05)
    assert process.end(status)["blamed"] == blamed


def test_every_measured_op_is_checked():
    assert set(SMALL) == set(OPS) < set(CHECKS)


@pytest.mark.parametrize("op", ["route", "grouped_gemm", "attention", "linear_cross_entropy"])
def test_cases_of_an_op_are_right_here(op):
    for _, run in op_cases(op, Context("cpu", ("fp32",))):
        assert max(run().values()) < 1e-4


def faulty(op, monkeypatch, change):
    """Let an op's own implementation pass its leaves through `change`."""
    original = OPS[op]

    def problem(new, *sizes):
        made = original.problem(new, *sizes)
        return replace(made, ours=lambda leaves: made.ours(change(leaves)))

    monkeypatch.setitem(OPS, op, original._replace(problem=problem))


def test_a_wrong_gradient_is_seen(monkeypatch):
    faulty("linear_cross_entropy", monkeypatch, lambda x: {
        **x, "x": x["x"].detach() + 0.01 * (x["x"] - x["x"].detach())})  # fmt: skip
    with pytest.raises(Wrong, match=r"x by 0\.99"):
        compare("linear_cross_entropy", (33, 72, 100), torch.float32, "cpu")


def test_a_gradient_that_should_be_zero_and_is_not_is_seen(monkeypatch):
    """Over one key the softmax is constant: the gradients of q and k are zero but for rounding."""
    sizes = (1, 1, 2, 2, 64, True)
    assert max(compare("attention", sizes, torch.float32, "cpu").values()) < 1e-5
    faulty("attention", monkeypatch, lambda x: {**x, "v": x["v"] + 0.001 * (x["q"] - x["q"].detach())})
    with pytest.raises(Wrong, match="q by 0"):
        compare("attention", sizes, torch.float32, "cpu")


def test_gradients_of_a_step_without_tokens_are_zeros():
    assert max(compare("moe_mlp", ("fine", 0), torch.float32, "cpu").values()) == 0


def test_every_backend_of_attention_that_a_gpu_may_choose_is_checked():
    """Also the Triton kernel, which "auto" leaves out where torch's is as fast."""
    on = Context("cuda", ("bf16", "fp16", "fp32"))
    names = {name: [case for case, _ in attention_cases(name, on)] for name in ("varlen", "triton", "flex")}
    assert len(names["triton"]) == 9
    assert {case.split()[0] for case in names["varlen"]} == {"full", "causal", "prefix"}
    assert {f"attention {name}" for name in names} < set(CHECKS)


@pytest.mark.parametrize("mask", ["full", "causal", "prefix"])
def test_a_wrong_mask_is_seen(mask, monkeypatch):
    assert max(masked_attention("segments", mask, torch.float32, "cpu").values()) < 1e-5
    other = Full() if mask == "causal" else Causal()
    truth = lambda q, k, v, cu_seqlens, **_: attention(q, k, v, cu_seqlens, mask=other)  # noqa: E731
    monkeypatch.setattr("mm1.bench.checks.attention_reference", truth)
    with pytest.raises(Wrong):
        masked_attention("segments", mask, torch.float32, "cpu")
