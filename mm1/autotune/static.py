"""Compile kernels on a machine without a GPU, and judge configurations by their registers, spills and shared memory.

A launch is recorded with tensors on "meta", so that shapes may be as large as in use, and compiled as the launcher
would: same specialisation of arguments, same options. Facts are cached on disk, by everything that they depend on.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.autotune.space import DTYPES, KERNELS, Inputs
from mm1.autotune.workers import Failed, Workers
from mm1.kernels.cost_model import resident
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import Launch, recording
from mm1.kernels.language import TensorDescriptor, triton
from mm1.kernels.tuning import cache_folder, pinned

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8", torch.int16: "i16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
LIMIT = 60.0  # seconds to compile a configuration; most take one to four, those with thousands of spills minutes
MATRIX = re.compile(r"HGMMA|UTC.*MMA|HMMA|v_mfma")  # wgmma, tcgen05, mma.sync, MFMA


@dataclass(frozen=True)
class Compiled:
    """Holds facts of the machine code of one launch."""

    name: str
    warps: int
    registers: int  # a thread
    spills: int  # instructions that store registers to memory and load them again
    stack: int  # bytes a thread
    shared: int  # bytes
    code: int  # bytes
    instructions: Counter[str]  # by opcode, modifiers left out

    @property
    def matrix(self) -> int:
        return sum(n for op, n in self.instructions.items() if MATRIX.match(op))

    @property
    def bulk_loads(self) -> int:
        return self.instructions["UTMALDG"]

    def programs(self, device: Device) -> int:
        """Return how many programs run on a multiprocessor at once."""
        return resident(self.shared, max(self.registers, 16), self.warps, device)

    def facts(self, device: Device) -> dict[str, Any]:
        """Return what tables keep."""
        kinds = {op: n for op, n in sorted(self.instructions.items()) if MATRIX.match(op)}
        return {
            "registers": self.registers, "stack": self.stack, "shared": self.shared, "code": self.code,
            "programs": self.programs(device), "matrix": kinds,
        }  # fmt: skip


class Task(NamedTuple):
    """Names a configuration at a shape on a GPU; it can be sent to another process."""

    kernel: str
    shape: tuple[Any, ...]
    config: Any
    bits: int
    device: str


def launches(task: Task) -> list[Launch]:
    """Return the distinct launches of a configuration."""
    kernel = KERNELS[task.kernel]
    with recording(DEVICES[task.device]) as recorded, pinned(**{task.kernel: task.config}):
        kernel.example(kernel.tunable.shape(*task.shape), Inputs("meta", DTYPES[task.bits]))()
    return distinct(launch for launch in recorded if launch.name in kernel.launched)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch of each machine code that these need."""
    return list({f"{launch.name} {specialize(launch)} {launch.options}": launch for launch in launches}.values())


def compile_task(task: Task) -> list[Compiled]:
    """Compile the launches of a configuration."""
    device = DEVICES[task.device]
    return [compile_launch(launch, device) for launch in launches(task)]


def compilers(processes: int) -> Workers:
    """Return processes that run `compile_task`."""
    return Workers(compile_task, processes, LIMIT)


def fault(task: Task, codes: list[Compiled] | Failed) -> str | None:
    """Return why a configuration must not be used, or None."""
    if isinstance(codes, Failed):
        return codes.why
    kernel, device = KERNELS[task.kernel], DEVICES[task.device]
    tall = getattr(task.config, "block_m", 0) >= 64
    for code in codes:
        if code.shared > device.shared:
            return f"{code.name} takes {code.shared} bytes of shared memory, {device.arch} has {device.shared}"
        if code.spills:
            return f"{code.name} spills: {code.spills} instructions"
        if task.bits == 16 and kernel.multiplies and code.name == kernel.launched[0]:
            if not code.matrix:
                return f"{code.name} has no matrix instruction"
            if device.wgmma and tall and code.instructions["HMMA"]:
                return f"{code.name} multiplies by mma.sync, expected wgmma"
    return None


def compile_launch(launch: Launch, device: Device) -> Compiled:
    """Compile one recorded launch for `device`, or read its facts from the cache."""
    signature, constants, attributes = specialize(launch)
    options = launch.options
    what = launch.kernel.cache_key, signature, constants, attributes, options, device.arch, triton.__version__
    path = cache_folder().parent / "static" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        facts = json.loads(path.read_text())
        return Compiled(**{**facts, "instructions": Counter(facts["instructions"])})
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target=_target(device), options=options)
    read = _read_amd if device.vendor == "amd" else _read_nvidia
    result = read(launch.name, compiled)
    with contextlib.suppress(OSError):
        write(path, json.dumps(vars(result)))
    return result


def write(path: Path, text: str) -> None:
    """Write a file atomically, also if other processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name: hosts that share a folder may use the same process number, and threads do.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def specialize(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility of the arguments, as Triton's launcher does; pointers are aligned."""
    signature, constants, attributes = {}, {}, {}
    kernel = launch.kernel
    for i, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(str(side) for side in value.block_shape)
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if isinstance(value, Tensor) or (specialized and isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _target(device: Device) -> Any:
    from triton.backends.compiler import GPUTarget

    if device.vendor == "amd":
        return GPUTarget("hip", device.arch, 64)
    return GPUTarget("cuda", int(device.arch[3:]), 32)


def _read_nvidia(name: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code))
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    last = max((int(at, 16) for at in re.findall(r"/\*([0-9a-f]{4,})\*/", code)), default=0)
    spills = opcodes["STL"] + opcodes["LDL"]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Compiled(name, warps, registers, spills, stack, shared, last + 16, opcodes)


def _read_amd(name: str, compiled: Any) -> Compiled:
    code, warps, shared = compiled.asm["amdgcn"], compiled.metadata.num_warps, compiled.metadata.shared
    wanted = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    count = {key: int(n) for key, n in re.findall(rf"\.({wanted}):\s+(\d+)", code)}
    opcodes = Counter(re.sub(r"(v_mfma).*", r"\1", op) for op in re.findall(r"^\s+([a-z]\w+) ", code, re.MULTILINE))
    length = len(compiled.asm["hsaco"])
    registers, spills, stack = (count[key] for key in wanted.split("|"))
    return Compiled(name, warps, registers, spills, stack, shared, length, opcodes)


@cache
def _binary(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([_binary(program), *arguments], capture_output=True, text=True, check=True).stdout
