"""The command as users meet it: what works, its help, and one line with status 2 for wrong arguments and input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from PIL import Image
from small import FOLDER

from mm1 import __version__
from mm1.cli import COMMANDS, main
from mm1.engine.run_config import Run, load_run
from mm1.engine.settings import hints, tables_of

TRAIN = f"""
[model]
size = "digits"
vision = {{ width = 32, layers = 1, heads = 1, ffn = 32 }}
connector = {{ hidden = 16, tokens = 4 }}
decoder = {{ width = 32, layers = 2, heads = 1, kv_heads = 1, ffn = 32 }}

[data]
tokenizer = "{FOLDER}/tokenizer.json"
tokens = 128
images = 8
patches = 256

[[data.sources]]
kind = "captions"
paths = ["shard-{{00..01}}.tar"]
weight = 45

[[data.sources]]
kind = "interleaved"
paths = ["documents.jsonl"]
weight = 45

[[data.sources]]
kind = "text"
paths = ["*.txt"]
weight = 10

[train]
steps = 3
accumulate = 1
compile = false
save_every = 2
"""


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def mm1(*arguments, cwd):
    command = [sys.executable, "-m", "mm1", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data in the three formats of the README, and a run of them."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members = []
        for i in range(4):
            out = io.BytesIO()
            Image.new("RGB", (12 + 8 * i, 12), (60 * i, 40, 90)).save(out, "PNG")
            members += [(f"{i}.png", out.getvalue()), (f"{i}.txt", f"a box of number {i}".encode())]
        write_tar(folder / f"shard-{shard:02d}.tar", members)
    documents = [{"texts": ["look:", None, "a box"], "images": [None, f"shard-00.tar/{i}.png", None]} for i in range(4)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "some.txt").write_text("three and four make seven.\none is less than two.\n")
    (folder / "run.toml").write_text(TRAIN)
    Image.new("RGB", (24, 12)).save(folder / "a.png")
    result = mm1("train", "run.toml", "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_train_writes_a_run_and_prints_plain_lines_without_a_terminal(folder):
    assert {"checkpoint", "metrics.jsonl", "step-00000002", "step-00000003"} <= {
        p.name for p in (folder / "out").iterdir()
    }
    result = mm1(
        "train", "run.toml", "--out", "out2", "--set", "train.steps=1", "--set", "train.tensorboard=true", cwd=folder
    )
    assert "indexed captions: 8 records in 2 files" in result.stderr
    assert " M parameters (vision " in result.stderr
    assert "step 1/1 loss" in result.stderr
    assert result.stderr.splitlines()[-1] == "trained to step 1; the checkpoint is out2/step-00000001"
    assert list((folder / "out2").glob("events.out.tfevents*"))


def test_resume_of_a_finished_run_does_nothing_and_says_so(folder):
    result = mm1("train", "run.toml", "--out", "out", "--resume", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 3 from out/step-00000003" in result.stderr
    assert "trained to step 3; the checkpoint is out/step-00000003" in result.stderr


def test_generate_takes_images_and_marks(folder):
    prompt = ["--image", "a.png", "--prompt", "quiz <image> what?", "--max-tokens", "5"]
    result = mm1("generate", "out/checkpoint", *prompt, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


BAD = [
    ([], "Expected one of {demo, train, "),
    (["trian"], "unknown command 'trian', did you mean train?"),
    (["xyzzy"], "unknown command 'xyzzy', expected one of demo, train, "),
    (["train"], "Missing from mm1 train: NAME|FILE"),
    (["--versoin"], "Unrecognized options: --versoin"),
    (["train", "digits", "--train.peaklr", "3"], "--train.peaklr, 3, did you mean --train.peak-lr?"),
    (["train", "digits", "--resumee"], "Unrecognized options: --resumee, "),
    (["train", "digits", "--train.steps"], "Missing value for argument '--train.steps'"),
    (["train", "digits", "--train.steps", "many"], "setting train.steps is 'many', expected an integer ≥ 1"),
    (["eval", "out"], "Missing from mm1 eval: BENCHMARK --data [PATH [PATH ...]] --out PATH"),
    (["generate", "out", "--top-k", "some"], "Error parsing --top-k: invalid literal for int() with base 10: 'some'"),
    (["generate", "out", "--weights", "int2"], "invalid choice 'int2' for argument '--weights'"),
    (["serve", "out", "--port", "70000"], "port is 70000, expected 0 to 65535"),
    (["bench"], "Expected one of {kernels, static, train, generate, all, report, readme}"),
    (["bench", "kernel"], "Unrecognized options: kernel"),
    (["train", "mm1-4b"], "unknown size 'mm1-4b', and no such file or folder; expected one of digits"),
    (["train", "nothing.toml"], "no such file: nothing.toml"),
    (["train", "mm1-3b"], "setting data.sources is empty: train a .toml file with [[data.sources]]"),
    (
        ["train", "digits", "--set", "data.tokenizer=none.json"],
        "/none.json', expected a file: make one by `mm1 tokenizer",
    ),
    (["train", "digits", "--set", "model=3"], "setting model is 3"),
    (["train", "run.toml", "--set", "train.stepz=3"], "unknown setting train.stepz, did you mean train.steps"),
    (["train", "run.toml", "--set", "train.steps=many"], "setting train.steps is 'many', expected an integer ≥ 1"),
    (["train", "run.toml", "--set", "train.steps"], "is not key=value"),
    (["train", "run.toml", "--set", "train.dtype=fp8"], "setting train.dtype is 'fp8'"),
    (["train", "run.toml", "--set", "data.tokenizer=run.toml"], "run.toml is not a tokenizer.json"),
    (["train", "run.toml", "--set", "model.connector.kind=mlp"], "setting model.connector.kind is 'mlp'"),
    (
        ["train", "run.toml", "--set", "model.connector.tokens=5"],
        "setting model.connector.tokens is 5, expected a square",
    ),
    (["train", "run.toml", "--set", "train.accumulate=0"], "train.accumulate is 0"),
    (["train", "run.toml", "--set", "data.tokens=3"], "data.tokens is 3"),
    (["train", "run.toml", "--set", "model.decoder.kv_heads=2"], "setting model.decoder.kv_heads is 2"),
    (["train", "run.toml", "--set", "model.vision.heads=3"], "setting model.vision.heads is 3"),
    (["train", "run.toml", "--out", "out"], "holds a run already"),
    (["generate", "out/checkpoint", "--image", "run.toml"], "run.toml"),
    (["generate", "out/checkpoint", "--image", "none.png"], "none.png"),
    (["generate", "nothing/here"], "no checkpoint at nothing/here"),
    (["generate", "out/checkpoint", "--prompt", "<image>"], "1 <image> marks, expected at most 0"),
    (["generate", "digits"], "no tokenizer"),
    (["bench", "kernels", "softmax"], "unknown op 'softmax'"),
    (["bench", "static", "softmax"], "unknown op 'softmax'"),
    (["bench", "static", "--device", "mi300x"], "device is 'mi300x', expected one of a100"),
    (["bench", "train", "mm1-9b"], "unknown size 'mm1-9b'"),
    (["bench", "kernels", "--json", "run.toml"], "run.toml is not a record"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_status_2(folder, arguments, message, monkeypatch, capsys):
    """The command runs in this process: a process of its own would take seconds to import torch."""
    if arguments[:1] == ["train"] and len(arguments) > 1 and "--out" not in arguments:
        arguments = [*arguments, "--out", "bad"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mm1", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1, said


def said(monkeypatch, capsys, *arguments):
    """Return what the command prints on standard output, in this process; it has to end with status 0."""
    monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code or 0
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def boxed(text):
    """Return the lines of tyro's help without borders, which depend on the terminal."""
    return [line[2:].rstrip(" │") for line in text.splitlines()]


BENCHMARKS = ("kernels", "static", "train", "generate", "all", "report", "readme")


@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS if name != "bench"] + [["bench", name] for name in BENCHMARKS], ids=" ".join
)
def test_help_explains_every_option_and_says_once_what_its_default_is(command, monkeypatch, capsys):
    options: list[str] = []
    for line in boxed(said(monkeypatch, capsys, *command, "--help")):
        if re.match(r"--\w|\[?[A-Z|]{2,}\]?( |$)", line):
            options.append("")
        if options:
            options[-1] += f" {line.strip()}"
    assert options
    for option in options:
        option = re.split("---+|───+", option)[0]  # where the next group begins
        assert len(re.findall(r"default:|\(required\)|\(repeatable\)", option)) == 1, option
        assert len(option) > 25, option
        assert "None" not in option, option


def test_help_of_train_lists_every_setting_with_its_range_and_default(monkeypatch, capsys):
    text = " ".join(" ".join(boxed(said(monkeypatch, capsys, "train", "--help"))).split())

    def names(cls, prefix):
        for field, hint in hints(cls).items():
            tables = tables_of(hint)
            yield from () if tables else [f"{prefix}{field}"]
            for table in tables:
                yield from names(table, f"{prefix}{field}.")

    for name in names(Run, ""):
        assert f"--{name.replace('_', '-')} " in text
    assert "(an integer ≥ 0 and ≤ 512; default: 0)" in text  # model.decoder.experts
    assert '(one of none, blocks, selective; default: "none")' in text
    assert "Peak learning rate; none: MM1's law" in text
    assert '("mm1" or "aim"; default: "mm1" or "aim")' in text, "kinds of models share options"
    assert "(an integer ≥ 1; default: 378 or 224)" in text
    assert "kind: one of captions, interleaved, text, conversations, images; paths: a list, each a string; w" in text


def test_help_is_written_to_a_terminal_of_ascii_too():
    done = subprocess.run([sys.executable, "-m", "mm1", "train", "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "(an integer ? 0" in done.stdout


def test_help_and_show_import_no_torch():
    calls = [["--help"], ["--version"], ["train", "--help"], ["train", "mm1-3b", "--show"], ["eval", "--help"], ["x"]]
    code = "import sys, contextlib\nfrom mm1.cli import main\nassert 'tyro' not in sys.modules\n" \
           f"for call in {calls!r}:\n    sys.argv = ['mm1', *call]\n" \
           "    with contextlib.suppress(SystemExit): main()\n" \
           "assert not {'torch', 'PIL', 'tokenizers', 'grain'} & set(sys.modules), sys.modules.keys()"  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_completion_for_a_shell_knows_the_options_of_all_commands(tmp_path, monkeypatch, capsys):
    said(monkeypatch, capsys, "--tyro-write-completion", "bash", tmp_path / "mm1")
    assert {"--train.peak-lr", "--shots-from", "--max-pixels"} <= set(
        re.findall(r"--[\w.-]+", (tmp_path / "mm1").read_text())
    )


def test_version(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "--version") == f"mm1 {__version__}\n"


def test_show_prints_the_run_that_training_would_have_as_a_file(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    text = said(
        monkeypatch, capsys, "train", "run.toml", "--show", "--train.peak-lr", "1e-3", "--set", "data.images=3",
        "--train.betas", "[0.5, 0.9]", "--model.connector.position_grid", "none", "--train.init", "1",
    )  # fmt: skip
    (folder / "shown.toml").write_text(text)
    settings = ["train.peak_lr=0.001", "data.images=3", "train.betas=[0.5, 0.9]", "model.connector.position_grid=none"]
    assert load_run("shown.toml") == load_run("run.toml", [*settings, 'train.init="1"'])
    assert load_run("shown.toml").train.peak_lr == 1e-3
    assert said(monkeypatch, capsys, "train", "shown.toml", "--show") == text
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])  # what is buffered is written when the command has returned
def test_an_error_that_is_not_about_the_input_is_one_line_and_status_1(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mm1", "--version"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (result.returncode, result.stderr) == (1, "mm1: [Errno 28] No space left on device\n")


def test_the_command_itself_ends_with_status_2_and_one_line(folder):
    result = mm1("generate", "nothing/here", cwd=folder)
    assert (result.returncode, result.stderr) == (2, "mm1: no checkpoint at nothing/here\n")


def test_damage_in_data_is_warned_of_listed_and_survived(folder):
    """The data have a truncated shard, a PNG that is text, and a caption without an image."""
    data = (folder / "shard-00.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[:4650])
    members = [("a.png", b"I am text"), ("a.txt", b"x"), ("b.txt", b"no image"), ("c.png", b"x"), ("c.txt", b"")]
    write_tar(folder / "bad.tar", members)
    sources = 'data.sources=[{kind="captions", paths=["shard-01.tar", "cut.tar", "bad.tar"]}]'
    result = mm1("train", "run.toml", "--out", "damaged", "--set", sources, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "cut.tar: cut off at byte 4650, inside a member" in result.stderr
    assert "skipped" in result.stderr
    assert "left out 3 different unreadable records, listed in damaged/quarantine" in result.stderr
    lines = [
        json.loads(line) for line in (folder / "damaged" / "quarantine" / "rank-00000.jsonl").read_text().splitlines()
    ]
    reasons = " ".join(line["reason"] for line in lines)
    assert {line["key"] for line in lines if "bad.tar" in line["shard"]} == {"a", "b", "c"}
    for reason in ("cut off", "not an image", "without an image", "empty caption"):
        assert reason in reasons


def test_the_run_and_the_document_of_the_pages_train_as_written(folder, tmp_path):
    pages = ((FOLDER.parents[3] / "docs" / page, kind) for page, kind in (("train.md", "toml"), ("data.md", "json")))
    run, document = (re.search(rf"```{kind}\n(.*?)```", page.read_text(), re.S)[1] for page, kind in pages)
    for name in ("captions", "documents", "text"):
        (tmp_path / name).mkdir()
    for shard in range(2):
        shutil.copy(folder / f"shard-{shard:02d}.tar", tmp_path / "captions" / f"shard-{shard:03d}.tar")
    shutil.copy(folder / "shard-00.tar", tmp_path / "documents")
    (tmp_path / "documents" / "some.jsonl").write_text(document)
    shutil.copy(folder / "some.txt", tmp_path / "text")
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    (tmp_path / "run.toml").write_text(run)
    small = ["train.steps=1", "train.accumulate=1", "train.compile=false", "data.tokens=400", "data.workers=1"]
    small += [f"model.vision.{x}" for x in ("width=32", "layers=1", "heads=1", "ffn=32")]
    small += [f"model.decoder.{x}" for x in ("width=32", "layers=1", "heads=1", "kv_heads=1", "ffn=32")]
    small += ["model.connector.hidden=16", "model.connector.depth=1"]
    result = mm1("train", "run.toml", "--out", "out", *(x for s in small for x in ("--set", s)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["images"] > 0
    assert json.loads(line)["skipped"] == 0
