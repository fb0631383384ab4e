"""What a kernel compiles to, on a machine without a GPU: machine code, registers, spills, shared memory.

A launch is recorded with tensors on "meta", so that shapes may be as large as they are in use, and compiled as the
launcher would have: same specialisation of arguments, same options.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from mm1.kernels.dispatch import Device, Launch

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8", torch.int16: "i16",
}  # fmt: skip
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int  # a thread
    spills: int  # instructions that go to memory for want of registers
    shared: int  # bytes
    instructions: Counter[str]  # by opcode, modifiers left out

    @property
    def matrix(self) -> int:
        """Matrix instructions: wgmma (HGMMA), tcgen05 (UTCHMMA), mma.sync (HMMA), MFMA."""
        return sum(n for op, n in self.instructions.items() if re.match(r"HGMMA|UTC.*MMA|HMMA|v_mfma", op))

    @property
    def bulk_loads(self) -> int:
        return self.instructions["UTMALDG"]


def compile_launch(launch: Launch, device: Device) -> Compiled:
    """The machine code of one recorded launch for `device`."""
    signature, constants, attributes = specialize(launch)
    options = {k: v for k, v in launch.constants.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target=_target(device), options=options)
    read = _read_amd if device.arch.startswith("gfx") else _read_nvidia
    return read(launch.kernel.fn.__name__, compiled)


def specialize(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisibility of the arguments, as Triton's launcher sees them; pointers are aligned."""
    signature, constants, attributes = {}, {}, {}
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments))
    values |= {name: value for name, value in launch.constants.items() if name in kernel.arg_names}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(str(side) for side in value.block_shape)
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _target(device: Device) -> GPUTarget:
    if device.arch.startswith("gfx"):
        return GPUTarget("hip", device.arch, 64)
    return GPUTarget("cuda", int(device.arch[3:]), 32)


def _read_nvidia(name: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    return Compiled(name, registers, opcodes["STL"] + opcodes["LDL"], compiled.metadata.shared, opcodes)


def _read_amd(name: str, compiled: Any) -> Compiled:
    code = compiled.asm["amdgcn"]
    count = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", code)}
    opcodes = Counter(re.sub(r"(v_mfma).*", r"\1", op) for op in re.findall(r"^\s+([a-z]\w+) ", code, re.MULTILINE))
    return Compiled(name, count["vgpr_count"], count["vgpr_spill_count"], compiled.metadata.shared, opcodes)


@cache
def _binary(name: str) -> str:
    return str(BINARIES / name)


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([_binary(program), *arguments], capture_output=True, text=True, check=True).stdout
