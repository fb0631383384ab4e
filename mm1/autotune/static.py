"""Compile kernels on a machine without a GPU, and judge configurations by their registers, spills and shared memory.

A launch is recorded with tensors on the "meta" device, which hold no memory, so that shapes may be as large as those of
real models. It is compiled as Triton's launcher would: with the same specialisation of arguments and the same options.
Facts are cached on disk under a hash of everything that they depend on.
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

from mm1.autotune import machine_code
from mm1.autotune.machine_code import Loop, main_loop
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
NO_LOOP = Loop()
LIMIT = 60.0  # seconds to compile a configuration, which takes one to four, or minutes with thousands of spills
MATRIX = re.compile(r"HGMMA|UTC.*MMA|HMMA|v_mfma")  # wgmma, tcgen05, mma.sync, MFMA


@dataclass(frozen=True)
class Compiled:
    """Hold facts about the machine code of one launch."""

    name: str  # of the Triton function
    warps: int
    registers: int  # per thread
    spills: int  # instructions that store registers to memory or load them again
    stack: int  # bytes per thread
    shared: int  # bytes
    code: int  # bytes
    instructions: Counter[str]  # number of each opcode, without its modifiers
    loop: Loop = NO_LOOP  # only of NVIDIA code

    @property
    def matrix(self) -> int:
        """Return the number of matrix instructions."""
        return sum(n for op, n in self.instructions.items() if MATRIX.match(op))

    def facts(self, device: Device) -> dict[str, Any]:
        """Return the facts that tables record. "programs" counts those that run on a multiprocessor at once."""
        programs = resident(self.shared, max(self.registers, 16), self.warps, device)
        matrix = {op: n for op, n in sorted(self.instructions.items()) if MATRIX.match(op)}
        return {"registers": self.registers, "stack": self.stack, "shared": self.shared, "code": self.code,
                "programs": programs, "matrix": matrix}  # fmt: skip


class Task(NamedTuple):
    """Identify a configuration at a shape on a GPU, in a form that can be sent to another process."""

    kernel: str
    shape: tuple[Any, ...]
    config: Any
    bits: int  # per element
    device: str  # key of DEVICES


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch for each different machine code that these launches need."""
    return list({f"{launch.name} {specialize(launch)} {launch.options}": launch for launch in launches}.values())


def compile_task(task: Task) -> list[Compiled]:
    """Compile the different launches of a configuration, and return their facts."""
    kernel, device = KERNELS[task.kernel], DEVICES[task.device]
    with recording(device) as recorded, pinned(**{task.kernel: task.config}):
        kernel.example(kernel.tunable.shape(*task.shape), Inputs("meta", DTYPES[task.bits]))()
    tuned = distinct(launch for launch in recorded if launch.name in kernel.launched)
    return [compile_launch(launch, device) for launch in tuned]


def compilers(processes: int) -> Workers:
    """Return processes that run `compile_task`."""
    return Workers(compile_task, processes, LIMIT)


def fault(task: Task, codes: list[Compiled] | Failed) -> str | None:
    """Return the reason why a configuration must not be used, or None if its code is sound."""
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
    arguments, options = specialize(launch), launch.options
    key = launch.kernel.cache_key, *arguments, options, device.arch, triton.__version__, _reader()
    path = cache_folder().parent / "static" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        facts = json.loads(path.read_text())
        return Compiled(**facts | {"instructions": Counter(facts["instructions"]), "loop": Loop(**facts["loop"])})
    from triton.compiler import ASTSource

    compiled: Any = triton.compile(ASTSource(launch.kernel, *arguments), target=target_of(device), options=options)
    read = _read_amd if device.vendor == "amd" else _read_nvidia
    result = read(launch.name, compiled)
    with contextlib.suppress(OSError):
        write(path, json.dumps({**vars(result), "loop": vars(result.loop)}))
    return result


@cache
def _reader() -> str:
    """Return a hash of the program that reads machine code, so that facts of an earlier version are not used."""
    return hashlib.sha256(Path(machine_code.__file__).read_bytes()).hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file atomically, even while other threads, processes or hosts write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, because hosts that share a folder may use the same process number, as threads always do.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def specialize(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility of the arguments as Triton's launcher derives them.

    Pointers count as aligned to 16 bytes.
    """
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


def target_of(device: Device) -> Any:
    """Return Triton's target for a device."""
    from triton.backends.compiler import GPUTarget

    if device.vendor == "amd":
        return GPUTarget("hip", device.arch, 64)
    return GPUTarget("cuda", int(device.arch[3:]), 32)


def _read_nvidia(name: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([nvidia_program(program), *options, file.name], capture_output=True, text=True, check=True)
            for program, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code.stdout))
    registers, stack = (int(re.findall(rf"{kind}:(\d+)", usage.stdout)[-1]) for kind in ("REG", "STACK"))
    last = max((int(at, 16) for at in re.findall(r"/\*([0-9a-f]{4,})\*/", code.stdout)), default=0)
    spills = opcodes["STL"] + opcodes["LDL"]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Compiled(name, warps, registers, spills, stack, shared, last + 16, opcodes, main_loop(code.stdout, warps))


def _read_amd(name: str, compiled: Any) -> Compiled:
    code, warps, shared = compiled.asm["amdgcn"], compiled.metadata.num_warps, compiled.metadata.shared
    fields = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    counts = {field: int(n) for field, n in re.findall(rf"\.({fields}):\s+(\d+)", code)}
    opcodes = Counter(re.sub(r"(v_mfma).*", r"\1", op) for op in re.findall(r"^\s+([a-z]\w+) ", code, re.MULTILINE))
    registers, spills, stack = (counts[field] for field in fields.split("|"))
    return Compiled(name, warps, registers, spills, stack, shared, len(compiled.asm["hsaco"]), opcodes)


def nvidia_program(name: str) -> Path:
    """Return the path of one of the NVIDIA programs that Triton comes with, such as "cuobjdump"."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
