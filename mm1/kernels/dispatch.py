"""What all ops share: the cost of a call, how to refuse an argument, where a Triton kernel runs and for what device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mm1.kernels.device import DEVICES, Device, identify
from mm1.kernels.language import INSTALLED, INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
READ = (*FLOATS, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations, and bytes read plus written once."""

    flops: int
    bytes: int


def expect(condition: bool, op: str, argument: str, found: object, expected: object) -> None:
    """ValueError naming op, argument, what was found and what was expected, unless `condition` holds.

    A shape with letters is a list, [T, "D"]: a string of it would make its sizes constants of compiled code.
    """
    if not condition:
        expected = f"[{', '.join(map(str, expected))}]" if isinstance(expected, list) else expected
        raise ValueError(f"{op}: {argument} is {found}, expected {expected}")


def expect_float(op: str, name: str, x: Tensor | None) -> None:
    """ValueError unless x is of a dtype that kernels compute in: FLOATS, and fp64 where a CPU computes."""
    if x is not None and x.dtype not in FLOATS:
        known = FLOATS if INTERPRETED or x.is_cuda else READ
        expect(x.dtype in known, op, f"dtype of {name}", x.dtype, known)


def expect_read(op: str, name: str, x: Tensor | None) -> None:
    """ValueError unless x is of a float that kernels widen or round as they read it."""
    expect(x is None or x.dtype in READ, op, f"dtype of {name}", None if x is None else x.dtype, READ)


def expect_integers(op: str, name: str, x: Tensor, ndim: int) -> None:
    """ValueError unless x holds integers in so many dimensions."""
    if x.dtype not in INTEGERS or x.ndim != ndim:
        expect(False, op, name, f"{x.dtype} {tuple(x.shape)}", f"integers of {ndim} dimensions")


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which a CPU adds up numbers of this dtype: fp32, or fp64 for its own."""
    return torch.promote_types(dtype, torch.float32)


def expect_alike(op: str, **tensors: Tensor | None) -> None:
    """ValueError naming the first tensor on another device than the first, TypeError for what is no tensor.

    None is left out. RuntimeError for tangents of forward mode, which torch's custom ops drop without a word.
    """
    first = None
    for name, tensor in tensors.items():  # at every call of every op: strings are made where something is wrong
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
    """In which autocast has products with x computed; None where it is off, and for fp64, which it leaves alone."""
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def refuse_second_order(op: Any, name: str) -> None:
    """Make the gradient of `op`, which computes the gradients of the public op `name`, a RuntimeError that says so."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{name}: gradients of gradients are not computed")

    op.register_autograd(refuse)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


class Launch(NamedTuple):
    """One launch of a Triton kernel: what static analysis compiles."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recording: tuple[Device, list[Launch]] | None = None


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Within the block kernels are not run but listed, as for this device; tensors may be on "meta"."""
    global _recording
    before, _recording = _recording, (device, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def device_of(x: Tensor) -> Device:
    """The device of x; the interpreter plays an H200."""
    if _recording is not None:
        return _recording[0]
    return device_of_index(x.device.index) if x.is_cuda else DEVICES["h200"]


@cache
def device_of_index(index: int | None) -> Device:
    """That of a GPU, as torch counts them."""
    p = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = p.gcnArchName.split(":")[0] if hip else f"sm_{p.major}{p.minor}"
    shared = 64 << 10 if hip else p.shared_memory_per_block_optin
    clock, width = getattr(p, "memory_clock_rate", 0), getattr(p, "memory_bus_width", 0)  # kHz; bits, of two edges
    bandwidth = 2 * clock * width / 8 / 1e6 or None
    slot = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
    try:
        pci = int(Path(f"/sys/bus/pci/devices/{slot}/device").read_text(), 16)
    except (OSError, ValueError):
        pci = None
    return identify(arch, p.multi_processor_count, shared, pci, bandwidth)


def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
    """Run `grid` programs of a Triton kernel on the device of its tensors; its arguments may all be keywords."""
    # Said aloud because Triton's default is about to change, and all versions are to round alike.
    constants["enable_fp_fusion"] = True
    if grid == 0:
        return
    if INSTALLED and not arguments:  # all by keyword
        arguments = tuple(constants.pop(name) for name in kernel.arg_names)
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments, constants))
        return
    if not INSTALLED:
        raise ImportError("a kernel on a GPU needs Triton, which is not installed: pip install triton")
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(grid,)](*arguments, **constants)
    else:
        kernel[(grid,)](*arguments, **constants)


def on_cpu(op: Any, implementation: Callable) -> None:
    """What `op`, a custom op whose body launches Triton kernels, does on CPU tensors instead."""
    if not INTERPRETED:
        op.register_kernel("cpu")(without_autocast(implementation))


def without_autocast(implementation: Callable) -> Callable:
    """The body of a custom op in the dtypes of its tensors: autocast, which the caller has followed, ends before it."""

    @wraps(implementation)
    def body(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return implementation(*arguments)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*arguments)

    return body
