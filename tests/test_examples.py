"""Each program and run of examples/ works; examples/torchtitan_experts.py has tests of its own."""

import json
import os
import runpy
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import FOLDER, small_run

from mm1.cli import main
from mm1.engine.run_config import load_run
from mm1.engine.train.trainer import train

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = """
[model]
size = "digits"
vision = { width = 32, layers = 1, heads = 1, ffn = 32 }
connector = { hidden = 16, tokens = 4 }
decoder = { width = 32, layers = 2, heads = 1, kv_heads = 1, ffn = 32 }
[data]
tokenizer = "tokenizer.json"
tokens = 128
images = 8
patches = 256
[[data.sources]]
kind = "text"
paths = ["text.txt"]
[train]
accumulate = 2
compile = false
"""


def small(table):
    """Return options that set each value of a nested table."""
    names = {f"{part}.{name}": value for part, fields in table.items() for name, value in fields.items()}
    return [word for name, value in names.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    train(small_run(steps=1), folder / "run")
    return folder / "run"


def test_kernels_learn_and_embed():
    program = runpy.run_path(str(EXAMPLES / "kernels.py"))
    losses = program["train_experts"](steps=25)
    assert losses[-1] < 0.3 * losses[0]
    tokens = program["embed_images"]([(5, 4), (1, 9)], width=16)
    assert tokens.shape == (2 * 16, 16)
    assert torch.isfinite(tokens).all()


def test_few_shot_answers_each_question_with_each_number_of_shots(checkpoint, capsys):
    runpy.run_path(str(EXAMPLES / "few_shot.py"))["main"](checkpoint)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ["0 shots", "4 shots", "8 shots"]
    assert len(lines) == len(heads) * (1 + 8)
    assert all("(right)" in line or "(wrong, it is " in line for line in lines if line not in heads)


def test_laptop_is_a_run_of_the_size_that_it_says():
    """tests/test_docs.py trains it."""
    from mm1.engine.models.mm1 import MM1

    run = load_run(str(EXAMPLES / "laptop.toml"))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MM1(run.model).parameters())
    assert "5 M parameters" in (EXAMPLES / "laptop.toml").read_text()
    assert round(parameters / 1e6) == 5


def test_finetune_continues_a_checkpoint_on_conversations(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(checkpoint)
    for folder in ("conversations", "text"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (24, 12)).save(tmp_path / "conversations" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A box."}]
    talk = {"id": "1", "image": "a.png", "conversations": turns}
    (tmp_path / "conversations" / "talks.json").write_text(json.dumps([talk]))
    (tmp_path / "text" / "a.txt").write_text("three and four make seven.\n" * 20)
    (tmp_path / "finetune.toml").write_text((EXAMPLES / "finetune.toml").read_text())
    options = small({
        "model": {"image_mode": "native", "image_size": 24, "image_patches": 64, "image_parts": 1},
        "data": {"tokens": 160, "images": 8, "workers": 0},
        "train": {"steps": 2, "accumulate": 1, "compile": "false", "warmup": 1},
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mm1", "train", "finetune.toml", "--out", "out", *options])
    main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["images"] > 0 for line in lines)


def cluster(folder, torchrun):
    """Run the script on one node of two GPUs. Slurm's commands are stand-ins."""
    python = f"exec {sys.executable} -m"
    stand_ins = {"srun": 'exec "$@"', "scontrol": "echo 127.0.0.1", "mm1": f'{python} mm1.cli "$@"',
                 "torchrun": torchrun.format(python=python)}  # fmt: skip
    (folder / "bin").mkdir()
    for name, script in stand_ins.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PORT": str(port),
        "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    command = ["bash", str(EXAMPLES / "cluster.sh"), "run.toml", "out", "--set", "train.steps=2"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_cluster_starts_torchrun_with_options_that_it_has(tmp_path):
    from torch.distributed.run import parse_args

    words = cluster(tmp_path, 'printf "%s\\n" "$@"').stdout.splitlines()
    options = parse_args(words)
    assert (options.nnodes, options.nproc_per_node, options.no_python) == ("1", "2", True)
    assert options.rdzv_endpoint.startswith("127.0.0.1:")
    assert [options.training_script, *options.training_script_args] == [
        "mm1", "train", "run.toml", "--out", "out", "--resume", "--set", "train.steps=2"
    ]  # fmt: skip


@pytest.mark.slow
def test_cluster_trains_on_two_processes(tmp_path):
    (tmp_path / "run.toml").write_text(SMALL)
    (tmp_path / "tokenizer.json").symlink_to(FOLDER / "tokenizer.json")
    (tmp_path / "text.txt").write_text("three and four make seven.\n" * 50)
    done = cluster(tmp_path, '{python} torch.distributed.run "$@"')
    assert "2 processes" in done.stderr
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("words", [[], ["run.toml"]])
def test_cluster_without_its_arguments_says_what_is_missing(words):
    done = subprocess.run(["bash", str(EXAMPLES / "cluster.sh"), *words], capture_output=True, text=True)
    assert done.returncode != 0
    assert ("a folder" if words else "a .toml file") in done.stderr
