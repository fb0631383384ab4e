"""Runs on several processes, over gloo, beside the same run on one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import parallel_runs
import pytest
import torch
from conftest import relative_error

import mm1
from mm1.engine import checkpoint
from mm1.engine.config import DIGITS_FOLDER, Parallel
from mm1.engine.data.record import DataError
from mm1.engine.parallel import World

LAYOUTS = {"shard": {}, "tensor": {"tensor": 2}, "expert": {"expert": 2}, "replicate": {"replicate": 2}}
MODELS = {"dense": 0, "mixture": 4}


def launch(folder, processes, jobs):
    """Of each job the lines that its run showed, one after another on so many processes."""
    path = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    if processes == 1:
        threads = torch.get_num_threads()
        parallel_runs.main(path)
        torch.set_num_threads(threads)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        command += [parallel_runs.__file__, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(job["folder"], "lines.json").read_text()) for job in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


TRAIN = {"steps": 20, "save_every": 10}
KEYS = [
    (model, layout) for model in MODELS for layout in ("alone", *LAYOUTS) if model == "mixture" or layout != "expert"
]
CUT = [key for key in KEYS if key[1] != "alone"]


@pytest.fixture(scope="module")
def runs(folder):
    """20 steps of the same data: on one process and, however the model is cut, on two. Lines by (model, layout)."""
    jobs = {key: {"folder": str(folder / "-".join(key)), "experts": MODELS[key[0]],
                  "parallel": LAYOUTS.get(key[1], {}), "train": TRAIN} for key in KEYS}  # fmt: skip
    alone = [key for key in KEYS if key not in CUT]
    lines = dict(zip(alone, launch(folder, 1, [jobs[key] for key in alone])))
    return lines | dict(zip(CUT, launch(folder, 2, [jobs[key] for key in CUT])))


@pytest.mark.parametrize("model, layout", CUT)
def test_two_processes_give_the_losses_of_one(model, layout, runs):
    found = runs[model, layout]
    assert [line["step"] for line in found] == list(range(1, 21))
    for expected, line in zip(runs[model, "alone"], found):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), line["step"]
        for name in ("grad_norm", "load_balance", "z_loss"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), line["step"]
        for name in ("tokens", "targets", "images", "data"):
            assert line[name] == expected[name]
    assert found[-1]["dropped"] == 0


@pytest.mark.parametrize("model, layout", CUT)
def test_a_sharded_checkpoint_is_the_model(model, layout, runs, folder, tmp_path):
    whole = checkpoint.weights(checkpoint.latest(folder / f"{model}-alone"))
    checkpoint.export(folder / f"{model}-{layout}", tmp_path / "out")
    found = mm1.load(tmp_path / "out").state_dict()
    assert set(found) == set(whole)
    for name, tensor in found.items():
        if not name.endswith("qkv.bias"):  # keys' have no gradient but rounding, which Adam makes large
            assert relative_error(tensor, whole[name]) < 1e-5, name
    assert not (tmp_path / "out" / "state.json").exists()


def test_a_run_goes_on_with_other_processes_and_other_cuts(runs, folder, tmp_path):
    """From step 10 to step 20, as the run that never stopped."""
    moves = {  # name: from, processes, to
        "two to one": ("mixture-expert", 1, {}),
        "two to four": ("mixture-expert", 4, {"expert": 2}),
        "expert to tensor": ("mixture-expert", 2, {"tensor": 2}),
        "one to two": ("dense-alone", 2, {}),
    }
    jobs = {}
    for name, (before, _, parallel) in moves.items():
        shutil.copytree(folder / before / "step-00000010", tmp_path / name / "step-00000010")
        jobs[name] = {"folder": str(tmp_path / name), "experts": MODELS[before.partition("-")[0]],
                      "parallel": parallel, "train": TRAIN, "resume": True}  # fmt: skip
    for processes in (1, 2, 4):
        names = [name for name in moves if moves[name][1] == processes]
        for name, lines in zip(names, launch(folder, processes, [jobs[name] for name in names])):
            truth = runs[moves[name][0].partition("-")[0], "alone"][10:]
            assert [line["step"] for line in lines] == list(range(11, 21))
            for expected, line in zip(truth, lines):
                assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), (name, line["step"])


def test_text_alone_on_two_processes_keeps_nobody_waiting(folder, tmp_path):
    """The encoder always runs, if only on absent images."""
    text = [["text", [str(DIGITS_FOLDER / "text.txt")], 1.0]]
    (lines,) = launch(folder, 2, [{"folder": str(tmp_path / "run"), "sources": text, "train": {"steps": 2}}])
    assert [line["images"] for line in lines] == [0, 0]


@pytest.mark.parametrize("setting, size, message", [
    ({"tensor": 3}, 4, "4 processes are no multiple of replicate 1 × tensor 3"),
    ({"expert": 3}, 4, "setting parallel.expert is 3, expected a divisor of the 4 that shard"),
])  # fmt: skip
def test_refuses_layouts_that_do_not_go_up(setting, size, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(DataError, match=message):
        World(Parallel(**setting))
