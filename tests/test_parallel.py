"""Runs on several processes, over gloo, beside the same run on one."""

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import parallel_runs
import pytest
import torch
from conftest import relative_error
from small import small_model

import mm1
from mm1.engine.layers.experts import Experts
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import DIGITS_FOLDER
from mm1.engine.train import checkpoint
from mm1.engine.train.config import Parallel, Train
from mm1.engine.train.display import Display
from mm1.engine.train.parallel import World
from mm1.engine.train.trainer import Trainer
from mm1.errors import UserError

LAYOUTS = {"shard": {}, "tensor": {"tensor": 2}, "expert": {"expert": 2}, "replicate": {"replicate": 2}}
MODELS = {"dense": {"experts": 0}, "mixture": {"experts": 4}}


def launch(folder, processes, jobs):
    """Run the jobs one after another on so many processes; return of each the lines of its run, or its gradients."""
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
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
    return [result(Path(job["folder"])) for job in jobs]


def result(folder):
    path = folder / "gradients.pt"
    return torch.load(path) if path.exists() else json.loads((folder / "lines.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


TRAIN = {"steps": 12, "save_every": 6}
KEYS = [
    (model, layout) for model in MODELS for layout in ("alone", *LAYOUTS) if model == "mixture" or layout != "expert"
]
CUT = [key for key in KEYS if key[1] != "alone"]


@pytest.fixture(scope="module")
def runs(folder):
    """Twelve steps of the same data: on one process and, however the model is cut, on two. Lines by (model, layout)."""
    jobs = {key: {"folder": str(folder / "-".join(key)), "model": MODELS[key[0]],
                  "parallel": LAYOUTS.get(key[1], {}), "train": TRAIN} for key in KEYS}  # fmt: skip
    # The encoder always runs, if only on absent images.
    text = [["text", [str(DIGITS_FOLDER / "text.txt")], 1.0]]
    jobs["text"] = {"folder": str(folder / "text"), "sources": text, "train": {"steps": 2}}
    single = [key for key in KEYS if key not in CUT]
    lines = dict(zip(single, launch(folder, 1, [jobs[key] for key in single])))
    return lines | dict(zip([*CUT, "text"], launch(folder, 2, [jobs[key] for key in [*CUT, "text"]])))


@pytest.mark.parametrize("model, layout", CUT)
def test_two_processes_give_the_losses_of_one(model, layout, runs):
    found = runs[model, layout]
    assert [line["step"] for line in found] == list(range(1, 13))
    for expected, line in zip(runs[model, "alone"], found):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), line["step"]
        for name in ("grad_norm", "load_balance", "z_loss"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), line["step"]
        for name in ("tokens", "targets", "images", "data"):
            assert line[name] == expected[name]
        assert line.get("expert_load") == pytest.approx(expected.get("expert_load"))
        assert line.get("dropped", 0) == 0


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
    """From step 6 to step 12, as the run that never stopped."""
    moves = {  # name: from, processes, to
        "two to one": ("mixture-expert", 1, {}),
        "two to four": ("mixture-expert", 4, {"expert": 2}),
        "expert to tensor": ("mixture-expert", 2, {"tensor": 2}),
        "one to two": ("dense-alone", 2, {}),
    }
    jobs = {}
    for name, (before, _, parallel) in moves.items():
        shutil.copytree(folder / before / "step-00000006", tmp_path / name / "step-00000006")
        jobs[name] = {"folder": str(tmp_path / name), "model": MODELS[before.partition("-")[0]],
                      "parallel": parallel, "train": TRAIN, "resume": True}  # fmt: skip
    for processes in (1, 2, 4):
        names = [name for name in moves if moves[name][1] == processes]
        for name, lines in zip(names, launch(folder, processes, [jobs[name] for name in names])):
            truth = runs[moves[name][0].partition("-")[0], "alone"][6:]
            assert [line["step"] for line in lines] == list(range(7, 13))
            for expected, line in zip(truth, lines):
                assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), (name, line["step"])


EXPERTS = {"experts": 8, "kv_heads": 4}
ROUTERS = {
    "even": [],
    "two": [30.0, 30.0, 0, 0, 0, 0, 0, 0],  # which get every token
    "starved": [0, 0, -30.0, -30.0, 0, 0, 0, 0],  # two experts get none, of four processes all of the second's
}


def job_of(folder, router="even", **job):
    return {"folder": str(folder), "model": EXPERTS, "bias": ROUTERS[router], **job}


def apart(gradients, truth):
    """The largest relative difference of a parameter's gradients; one that is nothing but rounding counts little."""
    least = 1e-4 * truth["square"].sqrt()
    differences = {n: (gradients[n] - x).norm() / torch.maximum(x.norm(), least) for n, x in truth.items()}
    return max((float(x), name) for name, x in differences.items())


# Layouts of four processes, and settings of jobs that compute gradients. The micro-batches of some ranks have no image,
# no target or no document.
GRADIENTS = {
    "expert 4, two": ({"expert": 4}, {"router": "two"}),
    "expert 4, starved": ({"expert": 4}, {"router": "starved"}),
    "expert 2 of 4": ({"expert": 2}, {"router": "starved"}),
    "replicate 2, expert 2": ({"replicate": 2, "expert": 2}, {"router": "two"}),
    "replicate 2, tensor 2": ({"replicate": 2, "tensor": 2}, {"router": "starved"}),
    "tensor 4": ({"tensor": 4}, {"router": "two"}),
    "recompute blocks": ({"expert": 4}, {"router": "two", "train": {"recompute": "blocks"}}),
    "recompute selective": ({"expert": 4}, {"router": "two", "train": {"recompute": "selective"}}),
    "capacity": ({"expert": 4, "capacity": 1.0}, {}),
    "bf16, shard": ({}, {"train": {"dtype": "bf16"}}),
    "bf16, replicate": ({"replicate": 2}, {"train": {"dtype": "bf16"}}),
}
if find_spec("torchao"):
    GRADIENTS["float8"] = {}, {"train": {"dtype": "bf16", "float8": "rowwise"}}
STEPS = {"steps": 5, "save_every": 100}
LOSSES = {
    "unbalanced": ({"expert": 4}, {"router": "two", "train": STEPS}),
    **{f"bf16 {layout}": (parallel, {"train": STEPS | {"dtype": "bf16"}}) for layout, parallel in {
        "shard": {}, "tensor": {"tensor": 4}, "expert": {"expert": 4}}.items()},
}  # fmt: skip


def alone(parallel, settings):
    """The settings of the job that a single process runs: without layout and recomputing."""
    train = {k: v for k, v in settings.get("train", {}).items() if k != "recompute"}
    return settings | {"train": train, "parallel": {k: v for k, v in parallel.items() if k == "capacity"}}


@pytest.fixture(scope="module")
def four(folder):
    """Results by name on four processes, and the same on one."""
    cases = {name: (parallel, {"gradients": True, **settings}) for name, (parallel, settings) in GRADIENTS.items()}
    cases |= {name: (parallel, {"gradients": False, **settings}) for name, (parallel, settings) in LOSSES.items()}
    truths = {json.dumps(alone(*case)): alone(*case) for case in cases.values()}  # which several cases share
    jobs = [job_of(folder / f"truth-{i}", **settings) for i, settings in enumerate(truths.values())]
    results = dict(zip(truths, launch(folder, 1, jobs)))
    jobs = [job_of(folder / name, **settings | {"parallel": parallel}) for name, (parallel, settings) in cases.items()]
    return {name: (result, results[json.dumps(alone(*cases[name]))])
            for name, result in zip(cases, launch(folder, 4, jobs))}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_four_processes_give_the_gradients_of_one(name, four):
    gradients, truth = four[name]
    # Sharding and copies change no product, whatever its dtype; the other layouts only the order of fp32 sums.
    assert gradients["loss"] == pytest.approx(float(truth["loss"]), rel=1e-6)
    assert apart(gradients, truth)[0] < 1e-5, apart(gradients, truth)
    assert torch.equal(gradients["slots"], truth["slots"])
    assert (truth["slots"][:, -1] > 0) == (name == "capacity")


@pytest.mark.parametrize("name", LOSSES)
def test_four_processes_give_the_losses_of_one(name, four):
    """fp32 to 1e-6 with a router that sends all tokens to one process, bf16 to 1e-3 in every layout."""
    lines, truth = four[name]
    for expected, line in zip(truth, lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3 if "bf16" in name else 1e-6), line["step"]
        assert line["dropped"] == 0
    if name == "unbalanced":
        assert lines[-1]["expert_load"] == [4.0]  # two of eight experts do everything


WIDE = {  # processes: layouts
    4: [{}, {"tensor": 4}, {"expert": 4}, {"expert": 2}, {"replicate": 2}, {"replicate": 2, "tensor": 2},
        {"replicate": 2, "expert": 2}],
    8: [{}, {"expert": 8}, {"expert": 4}, {"replicate": 8}, {"replicate": 2, "expert": 4}, {"tensor": 4},
        {"replicate": 2, "tensor": 2}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", WIDE)
def test_every_layout_gives_the_gradients_and_losses_of_one_process(processes, folder, tmp_path):
    kinds = {router: {"router": router} for router in ROUTERS} | {"dense": {"model": {"experts": 0, "kv_heads": 4}}}
    cases = [
        (kind, parallel)
        for kind in kinds
        for parallel in WIDE[processes]
        if kind != "dense" or "expert" not in parallel
    ]
    train = {"train": {"steps": 4, "accumulate": 8, "save_every": 100}, "data": {"streams": 8}}
    for what in ({"gradients": True}, train):
        name = "-".join(what)
        singles = [{**job_of(tmp_path / f"{name}-{kind}", kinds[kind].get("router", "even")), **kinds[kind], **what}
                 for kind in kinds]  # fmt: skip
        truths = dict(zip(kinds, launch(folder, 1, singles)))
        jobs = [{**job_of(tmp_path / f"{name}-{i}", kinds[kind].get("router", "even")), **kinds[kind], **what,
                 "parallel": parallel} for i, (kind, parallel) in enumerate(cases)]  # fmt: skip
        for (kind, parallel), found in zip(cases, launch(folder, processes, jobs)):
            if what is train:
                for expected, line in zip(truths[kind], found, strict=True):
                    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), (kind, parallel, line["step"])
                    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), (kind, parallel)
                    assert line.get("dropped", 0) == 0
            else:
                assert apart(found, truths[kind])[0] < 1e-5, (kind, parallel, apart(found, truths[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "blocks", "selective"])
def test_blocks_compile_once_though_messages_change_their_sizes(recompute, folder, tmp_path):
    """train.recompile = "error" would end the run."""
    train = {"steps": 5, "save_every": 100}
    settings = {"model": {"experts": 4, "layers": 4, "moe_every": 1}, "train": train}
    (truth,) = launch(folder, 1, [{"folder": str(tmp_path / "alone"), **settings}])
    settings["train"] = train | {"compile": True, "recompute": recompute}
    (lines,) = launch(folder, 2, [{"folder": str(tmp_path / "run"), "parallel": {"expert": 2}, **settings}])
    for expected, line in zip(truth, lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["expert_load"] == pytest.approx(expected["expert_load"])


def routed(bias, capacity):
    """Slots that each expert serves of 96 tokens, those that tokens ask for, and the number dropped."""
    torch.manual_seed(0)
    experts = Experts(small_model(**EXPERTS).decoder)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parallel_runs.bias_router(experts, bias)
    experts.capacity = capacity
    x, mask = torch.randn(96, 32), torch.arange(96) < 90
    slots = experts(x, mask)[3]
    asked = torch.bincount(experts.router(x)[:90].topk(2).indices.flatten(), minlength=8)
    return slots[:-1].diff(prepend=torch.zeros(1, dtype=torch.int64)), asked, slots[-1]


@pytest.mark.parametrize("router", ROUTERS)
def test_capacity_cuts_each_expert_at_its_own_and_counts_what_it_drops(router):
    served, asked, dropped = routed(ROUTERS[router], 0.75)
    limit = math.ceil(0.75 * 96 * 2 / 8)
    assert torch.equal(served, asked.clamp(max=limit))
    assert dropped == (asked - served).sum() > 0
    served, asked, dropped = routed(ROUTERS[router], None)
    assert torch.equal(served, asked)
    assert dropped == 0


def test_a_run_shows_its_experts_load_and_warns_once_of_drops(tmp_path):
    run = parallel_runs.run_of({"model": EXPERTS | {"moe_every": 1}, "train": {"steps": 3}})
    run = dataclasses.replace(run, parallel=Parallel(capacity=1.0))
    shown = parallel_runs.Quiet()
    trainer = Trainer(run, tmp_path / "run", shown, False, World(run.parallel))
    layers = [m for m in trainer.model.modules() if isinstance(m, Experts)]
    asked = torch.zeros(len(layers), 8, dtype=torch.int64)

    def count(module, inputs, _):
        x, mask = inputs
        choice = module.router(x)[mask].topk(2).indices.flatten()
        limit = math.ceil(len(x) * 2 / 8)
        served[layers.index(module)] += torch.bincount(choice, minlength=8).clamp(max=limit)
        asked[layers.index(module)] += torch.bincount(choice, minlength=8)

    for layer in layers:
        layer.register_forward_hook(count)
    for step in range(3):
        served = torch.zeros_like(asked)
        asked.zero_()
        trainer.step()
        trainer.settle()
        load = served.amax(1) / served.double().mean(1)
        assert shown.lines[step]["expert_load"] == pytest.approx(load.tolist())
        assert shown.lines[step]["dropped"] == pytest.approx(1 - float(served.sum() / asked.sum()))
    assert shown.lines[0]["dropped"] > 0.001
    assert [message for message in shown.warnings if "parallel.capacity" in message] == shown.warnings[:1]
    trainer.feed.close()


def test_the_line_of_a_step_names_the_dropped_share(tmp_path):
    out = io.StringIO()
    display = Display(tmp_path, Train(steps=1, tensorboard=True), out=out)
    metrics = dict.fromkeys(("loss", "lr", "fill", "image_fill", "tokens", "images", "data_seconds", "skipped"), 0)
    with display.run(0):
        display.step(1, metrics | {"seconds": 1.0, "dropped": 0.0031, "expert_load": [1.5, 2.0]})
    assert "dropped 0.3%" in out.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["expert_load"] == [1.5, 2.0]


def test_text_alone_on_two_processes_keeps_nobody_waiting(runs):
    assert [line["images"] for line in runs["text"]] == [0, 0]


@pytest.mark.parametrize("setting, size, message", [
    ({"tensor": 3}, 4, "settings parallel.replicate 1 × parallel.tensor 3 do not divide 4 processes"),
    ({"expert": 3}, 4, "setting parallel.expert is 3, expected a divisor of the 4 processes that shard"),
])  # fmt: skip
def test_refuses_layouts_that_do_not_go_up(setting, size, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(UserError, match=message):
        World(Parallel(**setting))


def test_experts_of_a_dense_model_are_not_divided(monkeypatch):
    world = World()
    world.size, world.config = 2, Parallel(expert=2)
    with pytest.raises(UserError, match=r"setting parallel\.expert is 2, expected 1 for a model without experts"):
        world.shard_model(MM1(small_model(experts=0)), torch.float32)
