"""Define what all ops share: the cost of a call, checks of arguments, launches of Triton kernels and their device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mm1.kernels.device import DEVICES, Device, identify
from mm1.kernels.fallback import KernelError, guarded, is_strict, recoverable
from mm1.kernels.language import INSTALLED, INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # kernels compute in these
READ = (*FLOATS, torch.float64)  # kernels convert these as they read them
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Cost:
    """Hold the least work of one call: floating-point operations, and bytes read plus written once."""

    flops: int
    bytes: int


def expect(condition: bool, op: str, argument: str, value: object, expected: object) -> None:
    """Raise ValueError unless `condition` holds; the message names op, argument, its value and the expected one.

    Pass a shape with letters as a list, [T, "D"]: a string of it would make its sizes constants of compiled code.
    """
    if not condition:
        expected = f"[{', '.join(map(str, expected))}]" if isinstance(expected, list) else expected
        raise ValueError(f"{op}: {argument} is {value}, expected {expected}")


def expect_float(op: str, name: str, x: Tensor | None) -> None:
    """Raise ValueError unless x is None or has a dtype that kernels compute in: FLOATS, on a CPU also fp64."""
    if x is not None and x.dtype not in FLOATS:
        dtypes = FLOATS if INTERPRETED or x.is_cuda else READ
        expect(x.dtype in dtypes, op, f"dtype of {name}", x.dtype, dtypes)


def expect_read(op: str, name: str, x: Tensor | None) -> None:
    """Raise ValueError unless x is None or has a float dtype that kernels convert as they read it."""
    expect(x is None or x.dtype in READ, op, f"dtype of {name}", None if x is None else x.dtype, READ)


def expect_integers(op: str, name: str, x: Tensor, ndim: int) -> None:
    """Raise ValueError unless x holds integers in `ndim` dimensions."""
    if x.dtype not in INTEGERS or x.ndim != ndim:
        expect(False, op, name, f"{x.dtype} {tuple(x.shape)}", f"integers of {ndim} dimensions")


def expect_tensor(op: str, name: str, x: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError unless x is None or has this dtype and shape."""
    if x is not None and (x.dtype != dtype or tuple(x.shape) != shape):
        expect(False, op, name, f"{x.dtype} {tuple(x.shape)}", f"{dtype} {shape}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a CPU accumulates numbers of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def expect_alike(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device, and TypeError for a value that is no tensor.

    Values of None are skipped. Raises RuntimeError for tensors with a forward-mode tangent, which torch's custom ops
    would drop silently.
    """
    first = None
    for name, tensor in tensors.items():  # runs at every call of every op, so strings are built only for errors
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a tensor")
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(f"{op}: device of {name} is {tensor.device}, expected {first[1]}, that of {first[0]}")
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{op}: {name} has a tangent, but forward-mode derivatives are not computed")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes products with x; None where it is off, and for fp64 x."""
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def refuse_second_order(op: Any, name: str) -> None:
    """Make differentiating `op`, the backward op of the public op `name`, raise RuntimeError."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{name}: gradients of gradients are not computed")

    op.register_autograd(refuse)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def unit_stride(x: Tensor) -> Tensor:
    """Return x with a last stride of 1, copied where it has another one."""
    return x if x.stride(-1) == 1 else x.contiguous()


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Launch(NamedTuple):
    """Hold one recorded launch of a Triton kernel, which static analysis compiles."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]  # by name: the kernel's parameters and Triton's OPTIONS

    @property
    def name(self) -> str:
        """Return the name of the kernel's function."""
        return self.kernel.fn.__name__

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments that are options of Triton."""
        return {name: self.arguments[name] for name in OPTIONS if name in self.arguments}


_recording: tuple[Device, list[Launch]] | None = None


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Record the launches in the block instead of running them, configured for `device`; tensors may be on "meta"."""
    global _recording
    before, _recording = _recording, (device, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def device_of(x: Tensor) -> Device:
    """Return the GPU of x, or an H200 for tensors that are not on a GPU, as when kernels are interpreted."""
    if _recording is not None:
        return _recording[0]
    return device_of_index(x.device.index) if x.is_cuda else DEVICES["h200"]


@cache
def device_of_index(index: int | None) -> Device:
    """Return the properties of the GPU with this index in torch."""
    p = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = p.gcnArchName.split(":")[0] if hip else f"sm_{p.major}{p.minor}"
    shared = p.shared_memory_per_block if hip else p.shared_memory_per_block_optin
    clock, width = getattr(p, "memory_clock_rate", 0), getattr(p, "memory_bus_width", 0)  # kHz and bits
    transfers = 4 if arch in ("gfx942", "gfx950") else 2  # a clock: AMD reports 1300 MHz for HBM3 of 5.2 GT/s
    bandwidth = transfers * clock * width / 8 / 1e6 or None
    slot = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
    try:
        pci = int(Path(f"/sys/bus/pci/devices/{slot}/device").read_text(), 16)
    except (OSError, ValueError):
        pci = None
    return identify(arch, p.multi_processor_count, shared, pci, bandwidth)


def launch(kernel: Any, grid: int, /, **arguments: Any) -> None:
    """Run `grid` programs of a Triton kernel on the device and the current stream of its tensors.

    arguments: the kernel's parameters by name, num_warps and num_stages. Raises ImportError where Triton is missing,
    KernelError where the kernel cannot run but its op can be computed in plain torch, and other errors as they are.
    """
    # Set explicitly, as Triton's default may change, and all versions must round alike.
    arguments["enable_fp_fusion"] = True
    if grid == 0:
        return
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments))
        return
    if not INSTALLED:
        raise ImportError("a kernel on a GPU needs Triton, which is not installed: pip install triton")
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    is_other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if is_other else nullcontext():
        try:
            kernel[(grid,)](**arguments)
        except Exception as error:
            if is_strict() or not recoverable(error, device):
                raise
            raise KernelError(kernel.fn.__name__, error) from error


def strides(x: Tensor | None, *names: str) -> dict[str, int]:
    """Return the strides of x as arguments with these names, one for each dimension; zeros for None."""
    return dict(zip(names, (0,) * len(names) if x is None else x.stride()))


def custom_op(
    name: str, body: Callable, cpu: Callable | None = None, mutates: tuple[str, ...] = (), plain: Callable | None = None
) -> Any:
    """Define the custom op mm1::name, whose body launches Triton kernels.

    cpu: computes the same on CPU tensors. plain: computes the same with torch on any device, for GPUs that cannot run
    the kernels (see fallback.py); `cpu` by default.
    """
    computed = plain or cpu
    assert computed is not None, f"{name} needs an implementation in plain torch"
    body = guarded(name, body, without_autocast(computed))
    op = torch.library.custom_op(f"mm1::{name}", body, mutates_args=mutates)
    if cpu is not None and not INTERPRETED:
        op.register_kernel("cpu")(without_autocast(cpu))
    return op


def without_autocast(implementation: Callable) -> Callable:
    """Wrap the body of a custom op so that it runs without autocast; its caller has cast the tensors already."""

    @wraps(implementation)
    def body(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return implementation(*arguments)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*arguments)

    return body
