"""Load libmm1 and a stub driver, and call them, for the checks of libmm1 without a GPU."""

import argparse
import ctypes
import json
import re
import sys
from pathlib import Path

import torch

from mm1.autotune import ahead

OK, INVALID, UNSUPPORTED, NO_DRIVER, NO_CONTEXT, DRIVER = 0, 1, 2, 3, 4, 1000
OPS = list(ahead.OPS)
HEADER = Path(__file__).parents[1] / "mm1.h"
BASE = 1 << 32  # the first device address of these tests; no memory is allocated
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDED = ("BLOCK_E", "CHUNK", "BINS", "BLOCK_C", "BLOCK")  # constants that may be larger than needed
RUNS = {
    80: 80,
    86: 80,
    87: 80,
    89: 80,
    90: 90,
    100: 100,
    103: 0,
    110: 0,
    120: 120,
    121: 0,
}  # the architecture that runs each compute capability
GEMM = 1, BASE, 2 * BASE, 3 * BASE, 4 * BASE, 1000, 8, 2048, 1024, 1, 5 * BASE, 1 << 30, 0
MOE = 1, *(i * BASE for i in range(1, 7)), 1000, 2, 8, 2048, 1024, 7 * BASE, 1 << 31, 0
EMBED = 1, *(i * BASE for i in range(1, 8)), 1000, 1024, 14, 27, 27, MEAN, STD, 8 * BASE, 1 << 30, 0
POOL = 1, BASE, 2 * BASE, 3 * BASE, 1000, 5, 2048, 12, 12, 0
CALLS = {"mm1_grouped_gemm": GEMM, "mm1_moe_mlp": MOE, "mm1_patch_embed": EMBED, "mm1_adaptive_pool": POOL}


class Record(ctypes.Structure):
    """Hold a launch as the stub driver records it."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("device", ctypes.c_int), ("count", ctypes.c_int), ("stream", ctypes.c_void_p),
        ("args", ctypes.c_uint64 * 64),
    ]  # fmt: skip


options: argparse.Namespace
library: ctypes.CDLL
driver: ctypes.CDLL
manifest: dict


def begin(arguments: argparse.Namespace) -> None:
    """Load the library, its manifest and, with --driver, the stub driver."""
    global options, library, manifest, driver
    options = arguments
    library = ctypes.CDLL(str(options.library))
    manifest = json.loads((options.code / "manifest.json").read_text())
    for name in public():
        if name.endswith("_workspace"):
            getattr(library, name).restype = ctypes.c_size_t
    library.mm1_error_string.restype = ctypes.c_char_p
    if options.driver and not options.late:
        driver = ctypes.CDLL(str(options.driver))
        driver.stub_record.restype = ctypes.POINTER(Record)


def public() -> set[str]:
    """Return the names of the functions that mm1.h declares."""
    return set(re.findall(r"^MM1_API .*?\b(mm1_\w+)\(", HEADER.read_text(), re.MULTILINE))


def call(name: str, *arguments) -> int:
    """Call a function of the library with integers of 64 bits, which also hold pointers and pass for an int."""
    passed = [(ctypes.c_double * 3)(*a) if isinstance(a, tuple) else ctypes.c_int64(a or 0) for a in arguments]
    return getattr(library, name)(*passed)


def size(op: str, *dims: int) -> int:
    """Return the bytes of an op's workspace."""
    return getattr(library, f"mm1_{op}_workspace")(*map(ctypes.c_int64, dims))


def choose(op: str, arch: int, dtype: int, *dims: int) -> int:
    """Return the number of the variant that the library chooses."""
    return library.mm1_choose(OPS.index(op), arch, dtype, (ctypes.c_int64 * 4)(*dims))


def records() -> list[Record]:
    """Return the launches that the stub driver recorded, and clear them."""
    launched = [Record.from_buffer_copy(driver.stub_record(i).contents) for i in range(driver.stub_count())]
    driver.stub_clear()
    return launched


def images_of(record: Record) -> list[dict]:
    """Return the images that a launch may be of. Configurations with different names can give the same bytes."""
    images = []
    for n, image in enumerate(manifest["images"]):
        if image["symbol"].encode() == record.name:
            content = (options.code / "images" / f"{n}.bin").read_bytes()
            if ctypes.string_at(record.code, len(content)) == content:
                images.append(image)
    assert images, f"{record.name} is not an image of the manifest"
    return images


def code_for(cc: int) -> int | None:
    """Return the architecture whose compiled code runs on this compute capability, or None."""
    archs = manifest["archs"]
    return RUNS[cc] if RUNS[cc] in archs else 0 if 0 in archs and cc > 80 else None


def nvidia() -> list[int]:
    """Return the compute capabilities that some code runs on, or skip the test if there are none."""
    supported = [cc for cc in RUNS if code_for(cc) is not None]
    return supported or sys.exit(77)


def hip() -> bool:
    """Return whether the stub driver is HIP's."""
    return "amdhip64" in str(options.driver)


def ints(*shape: int) -> torch.Tensor:
    """Return an int32 tensor on "meta"."""
    return ahead.empty(*shape)
