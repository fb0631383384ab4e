"""Report the state of this installation, and how to install what is missing.

The report must work when things are broken: each question is asked by itself, and one that fails becomes a line of the
report; torch is imported late, and optional packages are not imported.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mm1
from mm1.kernels.device import nearest
from mm1.kernels.tuning import SCHEMA, cache_folder, tables

PACKAGES = {
    "flash-attn": 'attention backend "flash-attn"', "xformers": 'attention backend "xformers"',
    "megablocks": 'moe_backend "megablocks"', "nvidia-ml-py": "clocks, power, heat and energy in records",
    "transformers": "mm1's kernels in its models, and conversion of its checkpoints",
    "timm": "mm1's kernels in NaFlexVit", "torchtitan": "mm1's kernels there, by examples/torchtitan_experts.py",
    "pyarrow": "training data in parquet", "matplotlib": "pictures of the demo's results",
    "tensorboard": "train.tensorboard",
}  # fmt: skip
INSTALL = {"flash-attn": "flash-attn --no-build-isolation", "megablocks": "megablocks grouped_gemm"}
# Requirements of the attention backends, repeated here because importing them takes longer than everything else.
BACKENDS = {
    "reference": (), "segments": (), "varlen": ("a GPU",), "flash-attn": ("a GPU", "flash_attn"),
    "flash-attn-3": ("a GPU", "flash_attn_interface"), "xformers": ("a GPU", "xformers"), "flex": (), "sdpa": (),
    "triton": ("a GPU", "triton"),
}  # fmt: skip
BF16 = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16", "svebf16")  # names in /proc/cpuinfo on x86 and ARM
BUILDS = "https://pytorch.org/get-started/locally"
Advise = Callable[[str], None]  # takes one line of advice


def doctor(as_json: bool = False) -> None:
    """Print a line for each fact, then advice. as_json: then print everything as one JSON object in the last line."""
    report: dict[str, dict[str, Any]] = {}
    todo: list[str] = []

    def ask(section: str, questions: dict[str, Callable[[Advise], Any]]) -> None:
        answers = report[section] = {}
        for name, question in questions.items():
            try:
                answers[name] = question(todo.append)
            except Exception as error:
                answers[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
                todo.append(f"{section} {name} {answers[name]}")
            parts = answers[name] if isinstance(answers[name], dict) and answers[name] else {"": answers[name]}
            for part, value in parts.items():
                print(f"{section:10} {f'{name} {part}':24} {_text(value)}")

    ask("software", SOFTWARE)
    ask("cpu", CPU)
    ask("gpu", {"seen": _gpus})
    gpus = report["gpu"]["seen"] if isinstance(report["gpu"]["seen"], int) else 0
    for i in range(gpus):
        ask(f"gpu {i}", {name: lambda advise, i=i, f=f: f(i, advise) for name, f in GPU.items()})
    ask("packages", {name: lambda _, n=name: _package(n) for name in PACKAGES})
    ask("attention", {name: lambda _, n=needs: _usable(n, gpus) for name, needs in BACKENDS.items()})
    ask("cache", {"folder": lambda _: str(cache_folder()), "files": _cache, "plain torch": _plain_ops})
    print("\nWhat to do", *(todo or ["nothing: all is well"]), sep="\n  ")
    if as_json:
        print(json.dumps(report | {"what to do": todo}))


def _torch(advise: Advise) -> str:
    import torch

    for package in filter(installed_version, ("torch", "torchvision")):
        for line in metadata.requires(package) or []:
            pin = re.match(r"(torch|[\w-]*triton[\w-]*) ?\(?==([\w.]+)", line)
            if pin and (here := (installed_version(pin[1]) or "none").partition("+")[0]) != pin[2]:
                advise(f"{package} is made for {pin[1]} {pin[2]}, here is {here}: pip install {pin[1]}=={pin[2]}")
    return f"{torch.__version__}, {_build()} build"


def _build() -> str:
    from torch.version import cuda, hip

    return f"CUDA {cuda}" if cuda else f"HIP {hip}" if hip else "CPU"


def _torchvision(advise: Advise) -> str | None:
    """Return torchvision's version. Its usual wheels are for CUDA, and fail to import with a CPU build of torch."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    number = re.findall("__version__ = '(.*)'", Path(spec.origin).with_name("version.py").read_text())[0]
    if "+cu" in number and _build() == "CPU":
        advise("torchvision is a CUDA build, torch is not: `import torchvision` fails unless declare_operators() of "
            "mm1.integrations.torchvision comes first; or pip install --force-reinstall --no-deps torchvision "
            "--index-url https://download.pytorch.org/whl/cpu")  # fmt: skip
    return number


def driver_version() -> str | None:
    """Return the newest CUDA version that the NVIDIA driver supports, or None without a driver."""
    number = ctypes.c_int()
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else None


def _gpus(advise: Advise) -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cuda, driver, hidden = (
        torch.version.cuda,
        driver_version(),
        [name for name in os.environ if "VISIBLE_DEVICES" in name],
    )
    if _build() == "CPU":
        if driver or Path("/dev/kfd").exists():
            advise(f"torch is a CPU build, but the driver of a GPU is here: {BUILDS}")
    elif cuda and not driver:
        advise("torch is a CUDA build, but no NVIDIA driver is here: install one, or give the container its GPUs")
    elif cuda and driver and int(driver.split(".")[0]) < int(cuda.split(".")[0]):
        advise(
            f"the NVIDIA driver runs CUDA {driver}, torch needs {cuda}: update it, or take the torch for it, {BUILDS}"
        )
    else:
        cure = f"unset {', '.join(hidden)}" if hidden else "nvidia-smi or amd-smi must list it first"
        advise(f"torch is a {_build()} build, but sees no GPU: {cure}")
    return 0


def _device(index: int, _: Advise) -> dict[str, Any]:
    import torch

    from mm1.autotune.gpu_state import pci_slot
    from mm1.kernels.dispatch import device_of_index

    properties, device = torch.cuda.get_device_properties(index), device_of_index(index)
    return {
        "name": properties.name, "known as": device.name, "pci": pci_slot(index), "architecture": device.arch,
        "multiprocessors": device.units, "memory GiB": round(properties.total_memory / 2**30, 1),
    }  # fmt: skip


def _tables(index: int, advise: Advise) -> dict[str, str]:
    """Return for each kernel the GPU whose table is used: this one, or the most similar one that has a table."""
    from mm1.kernels.dispatch import device_of_index

    device, used = device_of_index(index), {}
    for folder in sorted(tables().iterdir(), key=str) if tables().is_dir() else []:
        borrows = folder.name != "attention"  # that table lists speeds of backends on this GPU alone
        near = nearest(device.arch, device.units, device.bandwidth) if borrows else []
        names = [d.name for d in (device, *near) if (folder / f"{d.name}.json").is_file()]
        used |= {folder.name: names[0]} if names else {}
    if device.name not in used.values():
        advise(f"gpu {index} ({device.name}) has no table: mm1 tune")
    return used


def _state(index: int, advise: Advise) -> dict[str, Any]:
    from mm1.autotune.gpu_state import read, throttled

    state = read(index)
    if "driver" not in state and not _build().startswith("HIP"):
        advise(f"gpu {index}: {state['note']}")
    if throttled(state):
        reasons = _text(state["reasons"])
        advise(f"the clocks of gpu {index} are limited by {reasons}: check cooling and power before measuring")
    if state.get("others"):
        advise(f"gpu {index} also runs other processes: measure without them")
    return state


def _package(name: str) -> str:
    return installed_version(name) or f"missing, needed for {PACKAGES[name]}: pip install {INSTALL.get(name, name)}"


def _usable(needs: tuple[str, ...], gpus: int) -> str:
    missing = [need for need in needs if not (gpus if need == "a GPU" else find_spec(need))]
    return f"needs {' and '.join(missing)}" if missing else "usable"


def _cache(advise: Advise) -> dict[str, int]:
    """Return the number of files with the user's own rows, by kernel and GPU."""
    paths = sorted(cache_folder().glob("*/*/*.json"))
    for path in paths:
        with suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads(path.read_text())["schema"] == SCHEMA:
                continue
        advise(f"not a row of this version of mm1, delete it: {path}")
    return Counter("/".join(path.parts[-3:-1]) for path in paths)


def _plain_ops(advise: Advise) -> list[str]:
    """Return the ops whose kernels `mm1 doctor --gpu` found wrong with these versions, and their dtypes."""
    from mm1.kernels.fallback import remembered

    found = remembered()
    for (gpu, op, dtypes), why in found.items():
        advise(f"{op} ({dtypes}) runs in plain torch on {gpu}, as {why}: update, then mm1 doctor --gpu")
    return [f"{op} ({dtypes})" for _, op, dtypes in found]


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution without importing it, or None."""
    return next((distribution.version for distribution in metadata.distributions(name=package)), None)


def processor(field: str) -> str:
    """Return the value of a field of /proc/cpuinfo, or an empty string."""
    path = Path("/proc/cpuinfo")
    match = re.search(rf"^{field}\s*: (.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return match[1].strip() if match else ""


def _own_cores() -> int:
    """Return the number of cores that this process may use, or of all cores on macOS and Windows, which do not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(value: Any) -> str:
    if isinstance(value, list | dict):
        return ", ".join(value) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


SOFTWARE = {
    "mm1": lambda _: mm1.__version__,
    "python": lambda _: f"{platform.python_version()}, {sys.executable}",
    "os": lambda _: platform.platform(),
    "torch": _torch,
    "triton": lambda advise: (
        installed_version("triton") or installed_version("triton-rocm") or advise("no Triton: pip install triton")
    ),
    "torchvision": _torchvision,
    "cuda driver": lambda _: driver_version(),
    "compiler": lambda advise: shutil.which("cc") or advise("no C compiler, which Triton needs: apt-get install g++"),
}
CPU = {
    "model": lambda _: processor("model name") or platform.machine(),
    "bf16 instructions": lambda _: [name for name in BF16 if name in processor("(?:flags|Features)").split()],
    "cores": lambda _: f"{_own_cores()} of {os.cpu_count()}",
    "memory GiB": lambda _: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
}
GPU = {"device": _device, "table": _tables, "state": _state}
