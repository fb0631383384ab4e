"""Kernels, tuner, benchmarks and model need no more than a GPU image has: Python, torch, Triton and numpy."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / "mm1" / name for name in ("kernels", "autotune", "bench")]
COMMAND_LINE = "command.py"  # which needs tyro; python -m mm1.autotune.tune and mm1.bench.run do without
FILES = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))
         if path.parent.name != "suite" and path.name != COMMAND_LINE]  # fmt: skip
ENGINE = ("run_config", "models.mm1", "infer.generate", "train.ledger", "train.optim", "data.batch", "data.document",
          "data.packing")  # fmt: skip


HIDE = """
import importlib, sys
from importlib.machinery import PathFinder

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {root!r})
"""
RUN = """
import dataclasses
import numpy as np
import torch
from mm1.engine.models.mm1_config import DIGITS
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.data.record import View
from mm1.engine.models.mm1 import MM1

random, c = np.random.default_rng(0), dataclasses.replace(DIGITS, decoder=dataclasses.replace(DIGITS.decoder, layers=2))
tokens = np.concatenate([[3] * c.connector.tokens, random.integers(4, 384, 9)]).astype(np.int32)
image = random.integers(256, size=(8, 12, 3), dtype=np.uint8)
documents = [Document(tokens, (View("image", image),), ""), Document(tokens[-5:], (), "")]
batch = pack(documents, exact_budget(documents, 4), image_id=3, patch=4, slots=c.connector.tokens)
model = MM1(c).init_weights()
with torch.no_grad():
    print(*model.hidden(batch)[0].shape, float(model(batch).loss) > 0)
"""


def normal(name: str) -> str:
    return re.split(r"[^\w.-]", name)[0].lower().replace("_", "-")


def hidden() -> set[str]:
    """Top-level modules of installed packages but torch, Triton, numpy and what these require."""
    needed, waiting = set(), ["torch", "triton", "numpy"]
    modules = importlib.metadata.packages_distributions()
    installed = {normal(home) for homes in modules.values() for home in homes}
    while waiting:
        if (name := normal(waiting.pop())) in installed - needed:
            needed.add(name)
            waiting += [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r]
    return {module for module, homes in modules.items() if not needed & set(map(normal, homes))} - {"mm1"}


def bare(code: str) -> subprocess.CompletedProcess:
    setup = HIDE.format(hidden=hidden(), root=str(ROOT))
    return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)


def test_what_is_hidden_cannot_be_imported():
    assert {"PIL", "tokenizers", "grain", "absl", "safetensors", "rich", "tyro", "transformers", "timm"} <= hidden()
    assert "No module named 'PIL'" in bare("import PIL").stderr


def test_all_modules_import_and_a_model_runs_without_the_rest():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    modules += [f"mm1.engine.{name}" for name in ENGINE]
    imports = (
        "failed = []\n"
        f"for name in {modules!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: failed.append((name, str(error)))\n"
        "print(failed)\n"
    )
    result = bare(imports + RUN)
    assert result.stdout.splitlines() == ["[]", "30 96 True"], result.stdout + result.stderr
