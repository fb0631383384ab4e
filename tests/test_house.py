"""The house: who imports whom, what an import does, and what a wheel holds."""

import ast
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels", "errors"},
    "engine": {"kernels", "engine", "errors"},
    "autotune": {"kernels", "autotune", "errors"},
    "integrations": {"kernels", "integrations", "errors"},
    "bench": {"kernels", "engine", "autotune", "integrations", "bench", "errors"},
}
# A part of the engine imports what stands before it, and itself. The settings of a part stand before all.
ENGINE_ORDER = [
    {"settings"}, {"layers", "data"}, {"models"}, {"run_config"}, {"infer", "train"},
    {"evaluation", "listen", "serve", "convert"}, {"demo"},
]  # fmt: skip
OPTIONAL = {"transformers", "timm", "flash_attn", "xformers", "megablocks", "pynvml", "pyarrow", "matplotlib",
            "sklearn", "tensorboard", "wandb", "torchvision", "starlette", "uvicorn", "prometheus_client",
            "python_multipart", "multipart"}  # fmt: skip


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the full names of modules that a file imports; not those for type annotations alone."""
    found = set()
    statements = [ast.parse(path.read_text())]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module or "" for name in names}
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nested = () if top_level_only and not isinstance(node, ast.Module) else ast.iter_child_nodes(node)
            statements += nested
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted((ROOT / "mm1").rglob("*.py"))
MODULES = {module(path): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_know_only_whom_they_may(path):
    room = path.relative_to(ROOT / "mm1").parts[0]
    if room not in MAY_IMPORT:
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mm1" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[room], f"{path} imports {name}"
        if parts[:2] == ["torch", "distributed"]:
            assert path.name in ("parallel.py", "checkpoint.py", "sharding.py", "ranks.py"), f"{path} imports {name}"
        if room == "kernels":
            assert parts[0] in sys.stdlib_module_names | {"torch", "triton", "numpy", "mm1"}, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & OPTIONAL


def test_parts_of_the_engine_import_only_what_stands_before_them():
    rank = {part: i for i, parts in enumerate(ENGINE_ORDER) for part in parts}
    for name, path in MODULES.items():
        if not name.startswith("mm1.engine."):
            continue
        part = name.split(".")[2]
        for imported in imports(path):
            settings = imported.endswith("config") and imported.count(".") == 3
            if imported.startswith("mm1.engine.") and (other := imported.split(".")[2]) != part and not settings:
                assert rank[other] < rank[part], f"{name} imports {imported}"


def test_no_two_modules_import_each_other():
    graph = {name: (imports(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_four_folders_of_the_root_are_no_packages_that_could_hide_others():
    """Hugging Face's package is named kernels too."""
    for name in ("engine", "kernels", "autotune", "bench"):
        assert (ROOT / name).is_symlink()
        assert not (ROOT / name / "__init__.py").exists()
    code = "import kernels; print(kernels.__path__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "_NamespacePath" in found, "a regular package of that name would win over it"


def test_importing_does_nothing_but_import():
    modules = [m for m in MODULES if not m.endswith(("digits.make",))]
    code = (
        "import sys, importlib\n"
        f"for m in {modules!r}: importlib.import_module(m)\n"
        "import torch\n"  # torch and grain import what is taken out, if it is there
        f"print(sorted({OPTIONAL - {'pynvml', 'prometheus_client'}!r} & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-W", "error::UserWarning:mm1", "-c", code], cwd=ROOT,
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert result.stdout == "[] False\n"
    assert result.stderr == ""


def test_reading_data_needs_no_torch():
    code = (
        "import sys, mm1.engine.data.sources, mm1.engine.data.images, mm1.engine.data.document, "
        "mm1.engine.data.mixture\nprint({'torch', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_wheel_holds_every_file_but_the_records_once_and_its_licences(tmp_path):
    pytest.importorskip("hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT,
                   check=True, capture_output=True)  # fmt: skip
    archive = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = archive.namelist()
    assert len(names) == len(set(names))
    (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in metadata
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if ".dist-info/licenses/" in name}
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {"mm1/py.typed", "mm1/engine/data/digits/README.md"} <= packed
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "mm1"], cwd=ROOT, capture_output=True,
                             text=True).stdout.split()  # fmt: skip
    if not tracked:
        pytest.skip("not a git checkout")
    assert packed == {name for name in tracked if not name.startswith("mm1/bench/results/")}


def test_public_names_are_there_and_lazy():
    code = (
        "import mm1, sys; assert 'torch' not in sys.modules; print(mm1.load.__name__, mm1.generate.__name__, mm1.MM1)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("load generate")


# A docstring begins with a sentence that has a verb; these words begin a noun or a question instead.
NO_SENTENCE = {"What", "How", "Who", "Where", "Whether", "Which", "When", "Of", "Those", "Its", "As", "Under"}
NO_IMPERATIVE = NO_SENTENCE | {"The", "A", "An", "Returns", "Raises", "Yields", "Computes"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_a_sentence(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef)) and (text := ast.get_docstring(node)):
            assert text.split()[0] not in NO_SENTENCE, f"{path}: {text}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            assert text.split()[0] not in NO_IMPERATIVE, f"{path}, {node.name}: {text}"
