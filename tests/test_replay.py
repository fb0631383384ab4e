"""A step of a run again, and what is said to differ."""

import dataclasses
import json

import pytest
import torch
from small import FOLDER, At, small_run

from mm1.engine.data.config import Source
from mm1.engine.train.display import Display
from mm1.engine.train.replay import Result, replay, show, verdict
from mm1.engine.train.trainer import Trainer, train
from mm1.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A run of 12 steps with checkpoints at 8 and 12, of files of its own."""
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} " + "ab " * (i % 9)}) + "\n" for i in range(60))
    )
    run = small_run()
    sources = (
        Source("captions", (str(FOLDER / "test-captions.tar.gz"),), 45),
        Source("text", (str(tmp_path / "text.jsonl"),), 10),
    )
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=sources))
    train(run, tmp_path / "run", display=Display(tmp_path / "run", run.train))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "step, begun", [(1, "the start"), (7, "the start"), (9, "step-00000008"), (11, "step-00000008")]
)
def test_a_sound_step_is_the_same_again(step, begun, folder):
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    found = replay(folder, step)
    assert found["from"] == begun
    assert found["verdict"] == ["nothing differs"]
    assert found["recorded"] == pytest.approx(found["again"], rel=1e-15)  # the norm by n, or times 1 / n: one rounding
    assert found["fp32"]["loss"] == pytest.approx(found["again"]["loss"], rel=1e-5)
    assert len(found["documents"]) == 5
    assert found["documents"][0]["loss"] >= found["documents"][-1]["loss"]
    assert "nothing differs" in show(found)
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_changed_files_are_data(folder):
    path = folder.parent / "text.jsonl"
    path.write_text(path.read_text().replace("line", "lime"))
    assert replay(folder, 11)["verdict"][0].startswith("data: those of step")


def test_another_result_of_the_same_data_is_hardware(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[9]["loss"] *= 1.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay(folder, 10)["verdict"] == ["hardware or software: step 10 differs from the recorded result"]
    assert replay(folder, 11)["verdict"] == ["hardware or software: step 10 differs from the recorded result"]


SOUND = Result(2.0, 0.5)


def test_results_that_vary_are_hardware():
    lines = verdict(None, None, SOUND, SOUND._replace(loss=2.5), SOUND, torch.float32)
    assert lines == ["hardware: two computations of the same step differ by 0.2"]


def test_what_fp32_does_not_confirm_is_a_kernel():
    assert verdict(None, None, SOUND, SOUND, SOUND._replace(norm=0.495), torch.float32) == [
        "kernel: float32 and fp32 differ by 0.01"
    ]
    assert verdict(None, None, SOUND, SOUND, SOUND._replace(norm=0.495), torch.bfloat16) == ["nothing differs"]


def test_another_layout_is_named_and_data_outweigh_it():
    lines = verdict(None, 7, SOUND, SOUND, SOUND, torch.bfloat16, "4 processes on cuda")
    assert lines[0].startswith("layout: step 7 differs from the recorded result")
    assert "by more than 0.03; the run had 4 processes on cuda" in lines[0]
    assert verdict(5, 7, SOUND, SOUND, SOUND, torch.bfloat16, "4 processes on cuda") == [
        "data: those of step 5 have changed"
    ]


def test_a_step_left_out_is_not_finite_again(tmp_path):
    run = small_run(steps=6, save_every=3, skips=1)
    trainer = Trainer(run, tmp_path / "run", Display(tmp_path / "run", run.train))
    weight = trainer.model.decoder.norm.weight
    kept = weight.detach().clone()

    def poison():
        kept.copy_(weight.detach())
        weight.data[0] = float("nan")

    trainer.observers.append(At(begins={4: poison}, ends={4: lambda: weight.data.copy_(kept)}))
    trainer.fit()
    found = replay(tmp_path / "run", 4)
    assert found["recorded"]["loss"] != found["recorded"]["loss"]
    assert torch.isfinite(torch.tensor(found["again"]["loss"]))
    assert found["verdict"] == ["hardware or software: step 4 differs from the recorded result"]


@pytest.mark.parametrize("step", [0, 13])
def test_refuses_steps_that_were_not(step, folder):
    with pytest.raises(UserError, match=f"has no metrics of step {step}, only of 12 steps up to 12"):
        replay(folder, step)


def test_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        replay(tmp_path, 1)
