"""Every command, program and link in README.md, CONTRIBUTING.md and docs/ works as written."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from small import FOLDER, small_run

from mm1.cli import main
from mm1.engine.run_config import from_dict, load_run
from mm1.engine.train.trainer import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_GPU = "<!-- needs a GPU -->"
RUN_ELSEWHERE = ("img2dataset",)  # in tests/test_sources.py
# What makes a command that is understood, and that would run for long, stop at a bad value instead.
STOPPED = {"bench": ("--json", "README.md"), "bench report": (), "tune": ("--processes", "0")}
PROGRAMS = {"mm1", "torchrun", "make", "pip", "tar", "cp", "cmake", "ctest", "git"}


class Block(NamedTuple):
    page: Path
    kind: str  # of a fenced block; "" if indented
    text: str
    needs_gpu: bool


def blocks(page):
    """Return the fenced and indented blocks of a page, in order."""
    found, before, blank, lines = [], "", True, iter([*page.read_text().splitlines(), ""])
    for line in lines:
        fence = re.match(r"```(\w*)", line)
        if fence or (line.startswith("    ") and blank):
            text = [] if fence else [line[4:]]
            for line in lines:
                if line.startswith("```") if fence else line and not line.startswith("    "):
                    break
                text.append(line if fence else line[4:])
            code = "\n".join(text).strip("\n") + "\n"
            found.append(Block(page, fence[1] if fence else "", code, before == NEEDS_GPU))
        blank = not line.strip()
        before = line.strip() or before
    return found


BLOCKS = [block for page in PAGES if page.exists() for block in blocks(page)]


def commands():
    """Return the page and the words of each command, without comments; lines that a program printed are none."""
    for block in BLOCKS:
        printed = "$ " in block.text
        for line in block.text.replace("\\\n", " ").splitlines() if not block.kind else ():
            for part in (line.removeprefix("$ ") if line.startswith("$ ") or not printed else "").split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    words[0] = words[0].removeprefix(".venv/bin/")
                    yield block.page, words


def mm1(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mm1", *words])
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with what the pages speak of: checkpoints of small models, a photo, and a folder with it."""
    folder = tmp_path_factory.mktemp("place")
    train(small_run(steps=1), folder / "runs" / "demo")
    with tarfile.open(FOLDER / "test-captions.tar.gz") as tar:
        photo = tar.extractfile("001300.png").read()
    (folder / "pictures").mkdir()
    for path in (folder / "photo.png", folder / "pictures" / "photo.png"):
        path.write_bytes(photo)
    sources = f'data.sources=[{{kind="images",paths=["{folder}/pictures"]}}]'
    train(load_run("aim-clipart", [sources, "data.images=2", "train.steps=1"]), folder / "runs" / "pictures")
    return folder


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.kind == "python"}), ids=lambda page: page.stem
)
def test_programs_run(page, place, monkeypatch):
    """Programs of one page run one after another, as a reader would type them."""
    monkeypatch.chdir(place)
    names = {}
    for block in blocks(page):
        if block.kind != "python" or any(word in block.text for word in RUN_ELSEWHERE):
            continue
        code = compile(block.text, f"{page.name}", "exec")
        if block.needs_gpu:
            continue
        if "openai" in block.text:
            from service import serving

            with serving(names["model"]) as (port, _):
                exec(block.text.replace(":8000/", f":{port}/").replace('"demo"', '"small"'), names)
        else:
            exec(code, names)


def test_programs_of_commands_are_known():
    assert {words[0] for _, words in commands()} <= PROGRAMS


COMMANDS = [words[words.index("mm1") + 1 :] for _, words in commands() if "mm1" in words[:1] or words[0] == "torchrun"]


def understood(monkeypatch, capsys, words):
    """Say whether the command's parser takes these words; the command itself stops at files that are missing."""
    status = mm1(monkeypatch, *words)
    said = capsys.readouterr()
    return status == 0 or not re.search("unrecognized|missing from|required|parsing|--help", said.err + said.out, re.I)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("neither a record nor a folder")
    assert understood(monkeypatch, capsys, [*words, *STOPPED.get(" ".join(words[:2]), STOPPED.get(words[0], ()))])


@pytest.mark.parametrize(
    "words", ["generate a --colour red", "train --out a", "eval a b --out c --data d --shots many"]
)
def test_commands_that_are_wrong_would_be_noticed(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert not understood(monkeypatch, capsys, words.split())


def test_targets_of_make_exist():
    for _, words in commands():
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True).returncode == 0, words


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for names in re.findall(r"(?:\.|mm1-engine)\[([a-z,]+)\]", page.read_text())
             for name in names.split(",")}  # fmt: skip
    assert named
    assert named <= extras.keys()


def test_settings_of_fragments_exist():
    for block in BLOCKS:
        if block.kind == "toml" and "[parallel]" in block.text:
            from_dict({"model": "mm1-1b", **tomllib.loads(block.text)})


def test_ask_and_train_of_the_readme_work_as_written(place, tmp_path, monkeypatch, capsys):
    """On pictures of our own, and for one step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(place / "runs" / "demo")
    (tmp_path / "mm1").symlink_to(ROOT / "mm1")
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (40 + 30 * i, 90), (40 * i, 90, 200)).save(tmp_path / "pictures" / f"{i}.jpg")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"a box of colour {i}")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = []
    for block in blocks(ROOT / "README.md"):
        for line in block.text.splitlines():
            program, *words = shlex.split(line, comments=True) if not block.kind and line.strip() else [""]
            if program in ("tar", "cp"):
                assert subprocess.run(line, shell=True, cwd=tmp_path).returncode == 0
            elif program.endswith("/mm1") and words[0] != "serve":
                more = ["--set", "train.steps=1"] if words[0] == "train" else []
                assert mm1(monkeypatch, *words, *more) == 0, capsys.readouterr().err
                ran.append(words[0])
    assert ran == ["generate", "tokenizer", "train", "generate"]
    assert Image.open(tmp_path / "photo.png").size == (32, 8)


def test_the_readmes_run_is_the_example():
    (run,) = (block.text for block in blocks(ROOT / "README.md") if block.kind == "toml")
    assert run in (ROOT / "examples" / "laptop.toml").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_explanation_is_the_printed_one(monkeypatch, capsys):
    (block,) = (block for block in BLOCKS if "mm1 explain" in block.text and not block.kind)
    command, *lines = block.text.splitlines()
    assert mm1(monkeypatch, *shlex.split(command)[2:]) == 0
    said = capsys.readouterr().out
    assert len(lines) > 3
    for line in lines:
        assert line.rstrip("…}") in said or "user " in line, line  # the reader's own rows are theirs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the site needs mm1-engine[docs]")
def test_site_is_built_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "moe_mlp" in (tmp_path / "api" / "kernels" / "index.html").read_text()
