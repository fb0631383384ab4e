"""`mm1 doctor` reports this machine, and made-up ones."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mm1.autotune import doctor as d
from mm1.autotune import gpu_state
from mm1.bench import command
from mm1.errors import UserError
from mm1.kernels import dispatch
from mm1.kernels.attention.backends import BACKENDS
from mm1.kernels.device import DEVICES, identify
from mm1.kernels.fallback import remember
from mm1.kernels.tuning import SCHEMA


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Make up a machine with a CPU build of torch, without drivers, and with an empty cache."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(d, "driver_version", lambda: None)
    monkeypatch.setattr(d, "SOFTWARE", {name: ask for name, ask in d.SOFTWARE.items() if name != "torchvision"})


@pytest.fixture
def visit(capsys):
    """Return a function that runs doctor and returns its lines, its report and its advice."""

    def run():
        d.doctor(as_json=True)
        *lines, last = capsys.readouterr().out.splitlines()
        report = json.loads(last)
        todo = report.pop("what to do")
        assert lines[lines.index("What to do") + 1 :] == [f"  {line}" for line in todo or ["nothing: all is well"]]
        return lines[: lines.index("")], report, todo

    return run


def installed(monkeypatch, versions, requires=None):
    monkeypatch.setattr(d, "installed_version", versions.get)
    monkeypatch.setattr(metadata, "requires", (requires or {}).get)


def test_a_machine_without_a_gpu_is_well(visit):
    lines, report, todo = visit()
    assert todo == []
    assert report["gpu"] == {"seen": 0}
    assert report["software"]["torch"] == f"{torch.__version__}, CPU build"
    assert not [line for line in lines if "failed" in line]
    for line in lines:  # one fixed layout: section, what, finding
        assert (line[10], line[35], line[36:].strip() != "") == (" ", " ", True), line
        assert line[:10].strip() in report, line


def test_in_a_process_of_its_own_it_is_quick_and_imports_nothing_optional():
    code = ("import sys\nfrom mm1.autotune.doctor import doctor\ndoctor()\n"
            "print(sorted({'transformers', 'timm', 'torchvision', 'triton', 'pyarrow', 'matplotlib', 'torchtitan', "
            "'tensorboard', 'mm1.kernels.attention.backends'} & set(sys.modules)))")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "\nWhat to do\n  " in result.stdout
    assert result.stderr == ""


def test_back_ends_are_those_of_attention(monkeypatch):
    assert list(d.BACKENDS) == list(BACKENDS)
    for name, backend in BACKENDS.items():
        assert backend.module is None or backend.module in d.BACKENDS[name]
        assert not backend.gpu or "a GPU" in d.BACKENDS[name]
    monkeypatch.setattr(d, "find_spec", lambda name: name == "flash_attn")
    assert d._usable(("a GPU", "xformers"), 0) == "needs a GPU and xformers"
    assert d._usable(("a GPU", "flash_attn"), 0) == "needs a GPU"
    assert d._usable(("a GPU", "flash_attn"), 1) == "usable"


def test_packages(visit, monkeypatch):
    installed(monkeypatch, {"timm": "1.2.3", "triton": "3.7.1"})
    lines, report, todo = visit()
    assert report["packages"]["timm"] == "1.2.3"
    assert report["packages"]["flash-attn"].endswith(": pip install flash-attn --no-build-isolation")
    assert report["packages"]["pyarrow"] == "missing, needed for training data in parquet: pip install pyarrow"
    assert "packages   timm                     1.2.3" in lines
    assert todo == []  # what is optional is not to be done


def test_versions_that_do_not_go_together(visit, monkeypatch):
    versions = {"torch": "2.13.0+cu130", "triton": "3.6.0", "torchvision": "0.27.0"}
    requires = {"torch": ["filelock", 'triton==3.7.1; platform_system == "Linux"'], "torchvision": ["torch (==2.12.0)"]}
    installed(monkeypatch, versions, requires)
    assert visit()[2] == [
        "torch is made for triton 3.7.1, here is 3.6.0: pip install triton==3.7.1",
        "torchvision is made for torch 2.12.0, here is 2.13.0: pip install torch==2.12.0",
    ]
    versions |= {"triton": "3.7.1", "torchvision": None}
    assert visit()[2] == []
    del versions["triton"]
    assert visit()[2] == [
        "torch is made for triton 3.7.1, here is none: pip install triton==3.7.1", "no Triton: pip install triton",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "build, cuda, broken",
    [("+cu130", None, True), ("+cpu", None, False), ("", None, False), ("+cu130", "13.0", False)],
)
def test_torchvision_of_another_build(monkeypatch, tmp_path, build, cuda, broken):
    (tmp_path / "version.py").write_text(f"__version__ = '0.28.0{build}'\n")
    monkeypatch.setattr(d, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(d, "installed_version", {"torchvision": "0.28.0"}.get)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    said = []
    assert d._torchvision(said.append) == f"0.28.0{build}"
    assert [("mm1.integrations.torchvision" in s and s.endswith("whl/cpu")) for s in said] == [True] * broken


@pytest.mark.parametrize(
    "cuda, hip, driver, hide, expected",
    [
        (None, None, "12.8", None, "torch is a CPU build, but the driver of a GPU is here"),
        ("13.0", None, None, None, "no NVIDIA driver is here"),
        ("13.0", None, "12.8", None, "the NVIDIA driver runs CUDA 12.8, torch needs 13.0"),
        ("13.0", None, "13.1", None, "torch is a CUDA 13.0 build, but sees no GPU: nvidia-smi"),
        ("12.8", None, "12.4", "", "torch is a CUDA 12.8 build, but sees no GPU: unset CUDA_VISIBLE_DEVICES"),
        (None, "7.0", None, None, "torch is a HIP 7.0 build, but sees no GPU"),
    ],
)
def test_why_no_gpu_is_seen(visit, monkeypatch, cuda, hip, driver, hide, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(d, "driver_version", lambda: driver)
    if hide is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hide)
    _, report, todo = visit()
    assert len(todo) == 1
    assert expected in todo[0]
    assert report["software"]["cuda driver"] == driver


@pytest.mark.parametrize("number, name", [(12080, "12.8"), (13000, "13.0"), (0, None)])
def test_driver(monkeypatch, number, name):
    monkeypatch.undo()

    def version(pointer):
        pointer._obj.value = number

    monkeypatch.setattr(d.ctypes, "CDLL", lambda path: SimpleNamespace(cuDriverGetVersion=version))
    assert d.driver_version() == name


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Make up an H200 and an unknown GPU of that architecture, with tables of an H200 and attention's of H100."""
    state = {"sm_mhz": 1980, "reasons": ["idle"], "others": 0, "ecc": True, "driver": "580.95"}
    states = [state, dict(state)]
    devices = [DEVICES["h200"], identify("sm_90", 114, 227 << 10, 0x2331)]
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=141 << 30, pci_domain_id=0, pci_bus_id=0x17,
                                 pci_device_id=0)  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(dispatch, "device_of_index", devices.__getitem__)
    monkeypatch.setattr(gpu_state, "read", states.__getitem__)
    monkeypatch.setattr(d, "tables", lambda: tmp_path)
    for path in ("grouped_gemm/h200.json", "experts_up/a100.json", "attention/h100.json"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("{}")
    return states


def test_gpus(visit, gpus):
    lines, report, todo = visit()
    assert report["gpu"] == {"seen": 2}
    assert report["gpu 0"]["device"] == {
        "name": "NVIDIA H200", "known as": "h200", "pci": "0000:17:00.0", "architecture": "sm_90",
        "multiprocessors": 132, "memory GiB": 141.0,
    }  # fmt: skip
    assert report["gpu 1"]["device"]["known as"] == "nvidia-2331-114"
    assert report["gpu 0"]["table"] == report["gpu 1"]["table"] == {"grouped_gemm": "h200"}
    assert todo == ["gpu 1 (nvidia-2331-114) has no table: mm1 tune"]
    assert "gpu 0      table grouped_gemm       h200" in lines
    assert "gpu 0      state reasons            idle" in lines
    assert "gpu 0      state ecc                true" in lines
    assert report["attention"]["varlen"] == report["attention"]["triton"] == "usable"


def test_state_of_a_gpu(visit, gpus, monkeypatch):
    gpus[0].update(reasons=["idle", "hardware_thermal"])
    gpus[1].update(others=3)
    assert visit()[2] == [
        "the clocks of gpu 0 are limited by idle, hardware_thermal: check cooling and power before measuring",
        "gpu 1 (nvidia-2331-114) has no table: mm1 tune",
        "gpu 1 also runs other processes: measure without them",
    ]
    gpus[0].clear()
    gpus[0]["note"] = "NVML cannot be read: pip install nvidia-ml-py"
    assert visit()[2][0] == "gpu 0: NVML cannot be read: pip install nvidia-ml-py"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert visit()[2][0].endswith("has no table: mm1 tune")  # without advice about NVML


def test_cache(visit, tmp_path):
    folder = tmp_path / "cache" / "configs" / "grouped_gemm" / "h200"
    folder.mkdir(parents=True)
    texts = {"a": json.dumps({"schema": SCHEMA}), "b": json.dumps({"schema": SCHEMA}), "c": "{", "d": "[]", "e": "{}",
             "f": json.dumps({"schema": SCHEMA + 1})}  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "g.json").write_bytes(b"\xff")
    (folder / "h.json").mkdir()
    _, report, todo = visit()
    assert report["cache"] == {"folder": str(tmp_path / "cache" / "configs"),
                               "files": {"grouped_gemm/h200": 8}, "plain torch": []}  # fmt: skip
    assert todo == [f"not a row of this version of mm1, delete it: {folder / name}.json" for name in "cdefgh"]


def test_ops_that_run_in_plain_torch_are_named(visit):
    remember("NVIDIA H200", {("route", "float32"): "route 77 8 2 was wrong (y by 0.3)"})
    _, report, todo = visit()
    assert report["cache"]["plain torch"] == ["route (float32)"]
    assert todo == ["route (float32) runs in plain torch on NVIDIA H200, as route 77 8 2 was wrong (y by 0.3): update, "
                    "then mm1 doctor --gpu"]  # fmt: skip


def test_first_contact_needs_a_gpu():
    with pytest.raises(UserError, match=r"torch sees no GPU.* mm1\.bench\.contact.*TRITON_INTERPRET=1"):
        command.doctor(gpu=True)


def test_it_never_raises(visit, monkeypatch, gpus):
    def broken(*_, **__):
        raise OSError("broken\nbadly")

    for place, name in ((torch.cuda, "get_device_properties"), (dispatch, "device_of_index"), (gpu_state, "read"),
                        (metadata, "distributions"), (d, "cache_folder"), (d, "find_spec"), (d, "processor"),
                        (Path, "read_text"), (d.shutil, "which"), (d.platform, "platform")):  # fmt: skip
        monkeypatch.setattr(place, name, broken)
    lines, report, todo = visit()
    assert report["gpu 1"]["table"] == "failed: OSError: broken badly"
    assert "gpu 1 table failed: OSError: broken badly" in todo
    assert report["software"]["python"].startswith(sys.version.split()[0])
    assert len([line for line in lines if "failed: OSError: broken badly" in line]) == len(todo)


def test_a_torch_that_cannot_be_imported(visit, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    _, report, todo = visit()
    assert report["software"]["torch"].startswith("failed: ModuleNotFoundError")
    assert report["gpu"]["seen"].startswith("failed")
    assert report["attention"]["varlen"] == "needs a GPU"
    assert todo[0].startswith("software torch failed")
