"""Compile the forward kernels for GPUs that are not here, and write the C tables by which native/mm1.c finds them.

    python -m mm1.autotune.ahead --out build/code --archs "80;90;100;120;gfx942"

Each op is recorded on "meta" tensors and its launches are compiled, once for every configuration from the GPU's table
or the op's default. Images of one kernel differ by their key (KEYS); everything else of a shape is an argument, passed
by name, so that native/mm1.c follows changes of a kernel's arguments, or does not compile.
"""

import argparse
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of the size

import torch

from mm1.autotune import space
from mm1.autotune.static import specialize
from mm1.autotune.tables import TABLES
from mm1.kernels import tiles
from mm1.kernels.abstractor import pooling as adaptive_pool
from mm1.kernels.abstractor import rows as conv_rows
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import Launch, recording
from mm1.kernels.language import triton
from mm1.kernels.moe import combine, experts
from mm1.kernels.moe import grouped as grouped_gemm
from mm1.kernels.moe import routing as route
from mm1.kernels.patches import embedding as patch_embed
from mm1.kernels.tuning import listening, pinned

GPUS = {"80": "a100", "90": "h200", "100": "b200", "120": "rtx5090", "gfx942": "mi300x"}
SMALL = replace(DEVICES["a100"], name="small", shared=99 << 10)  # the least of all GPUs since sm_80
PTX = 0  # the number of "any newer GPU"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their number in mm1.h
TOP_K = (2, 8)
EXPERTS = (8, 64, 256)  # upper bounds; a number between them runs as the next larger
CHANNELS = (1024, 2048, 4096)  # upper bounds too
PATCHES = (14, 16)
PLACES = ((8, 8), (12, 12))
ANY = (0, 2**31 - 1)

When = dict[str, tuple[int, int]]


def least(channels: int) -> int:
    """Return the smallest width that runs as this upper bound."""
    return channels // 2 + 1 if channels > CHANNELS[0] else 0


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _gemm(dtype: torch.dtype, dims: tuple[int, ...], transposed: bool) -> None:
    rows, experts, k, n = dims
    b = empty(experts, n, k, dtype=dtype).transpose(1, 2) if transposed else empty(experts, k, n, dtype=dtype)
    grouped_gemm.gemm(empty(rows, k, dtype=dtype), b, empty(experts), tail=True)


def _moe(dtype: torch.dtype, dims: tuple[int, ...], k: int) -> None:
    slots, E, D, F = dims
    x, weight = empty(slots // k, D, dtype=dtype), empty(slots // k, k, dtype=torch.float32)
    gate_up, down = empty(E, 2 * F, D, dtype=dtype), empty(E, D, F, dtype=dtype)
    order = empty(slots), empty(slots // k, k), empty(E)
    experts.forward(x, order, weight, gate_up, None, down, None, None, "silu", None, 0.0, False, False)


def _embed(dtype: torch.dtype, dims: tuple[int, ...], option: tuple[int, bool, bool]) -> None:
    P, _, width = dims
    patch, has_table, has_bias = option
    pixels, weight = empty(P * patch**2, 3, dtype=torch.uint8), empty(width, 3 * patch**2, dtype=dtype)
    bias = empty(width, dtype=dtype) if has_bias else None
    table = empty(27, 27, width, dtype=dtype) if has_table else None
    mode = ("bilinear", True, False) if has_table else ("nearest", False, False)
    fold = [1.5, 2.5, 3.5], [0.1, 0.2, 0.3]
    patch_embed.forward(pixels, weight, bias, table, empty(5, 4), empty(P), patch, *fold, 1, *mode)


def _pool(dtype: torch.dtype, dims: tuple[int, ...], out: tuple[int, int]) -> None:
    P, C = dims
    adaptive_pool.forward(empty(P, C, dtype=dtype), empty(5, 4), empty(P), *out)


@dataclass(frozen=True)
class Op:
    """Describes a kernel that has configurations; `each` in a condition means rows an expert."""

    kernel: str
    dims: tuple[str, ...]
    others: dict[str, tuple[Any, ...]]  # other fields of a row, and the values that the library's calls have
    config: type
    call: Callable[..., None]
    options: tuple[Any, ...]
    ladder: tuple[tuple[When, tuple[int, ...]], ...]  # conditions where the default changes, and example sizes


# Odd sizes wherever a size is an argument that need not be a multiple of 16, none of them 1.
_RUNGS = tuple(({"each": (0, m)} if m <= 64 else {}, (5 * m, 5, 2048, 1024)) for m in (16, 32, 64, 1001))
_BY_ROWS = ("rows", "experts", "k", "n", "each")
OPS = {
    "grouped_gemm": Op("_gemm_kernel", _BY_ROWS, {"gated": (False,)}, tiles.Config, _gemm, (False, True), _RUNGS),
    "experts_up": Op("_up_kernel", _BY_ROWS, {"gated": (True,)}, tiles.Config, _moe, TOP_K, _RUNGS),
    "patch_embed": Op(
        "_embed_kernel", ("patches", "k", "width"), {"word": (2, 4)}, tiles.Config, _embed,
        tuple((p, table, bias) for p in PATCHES for table, bias in ((False, True), (True, False))),
        (({}, (4001, 588, 1024)),),
    ),
    "adaptive_pool": Op(
        "_pool_kernel", ("rows", "channels"), {}, conv_rows.Config, _pool, PLACES,
        tuple(({"channels": (least(c), c)}, (4001, c)) for c in CHANNELS),
    ),
}  # fmt: skip

# The key of an image beside dtype and configuration; of images that fit, the one with the smallest last part is used.
KEYS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "_gemm_kernel": lambda v: (v["stride_bk"] == 1, 0, 0),
    "_up_kernel": lambda v: (v["FAN"], 0, 0),
    "_embed_kernel": lambda v: (v["K"], v["HAS_TABLE"], 0),
    "_pool_kernel": lambda v: (v["OH"], v["OW"], v["BLOCK_C"]),
    "_map_kernel": lambda v: (v["TAIL"], v["BLOCK_M"], v["BLOCK_E"]),
    "_count_kernel": lambda v: (0, 0, v["BINS"]),
    "_place_kernel": lambda v: (0, 0, v["BINS"]),
    "_combine_kernel": lambda v: (v["K"], v["BLOCK"], 0),
    "_places_kernel": lambda v: (v["PATCH"], 0, 0),
    "_fold_kernel": lambda v: (v["HAS_BIAS"], 0, 0),
}
KERNELS = tuple(KEYS)
HELPERS = set(KERNELS) - {op.kernel for op in OPS.values()}
# Integers that are multiples of 16 in every call; the library checks it.
MULTIPLES = re.compile(r"stride_\w+|K|N|D|F|C|CHUNK|K_PADDED")
ANY_NUMBER = {"_fold_kernel": ("K", "stride_n")}  # 588


class Target(NamedTuple):
    """Holds a GPU to compile for."""

    number: int  # compute capability, 942 or PTX
    device: Device
    gpu: str | None  # whose table it has


class Job(NamedTuple):
    """Names one image to compile."""

    target: int
    kernel: str
    dtype: int
    variant: int  # of all; -1: the kernel has no configurations
    key: tuple[int, ...]


def targets(archs: list[str]) -> list[Target]:
    """Return the targets of these architectures, with PTX for newer GPUs."""
    result = [Target(int(arch.removeprefix("gfx")), DEVICES[GPUS[arch]], GPUS[arch]) for arch in archs]
    return [*([Target(PTX, SMALL, None)] if "80" in archs else []), *result]


def recorded(device: Device, call: Callable[[], object], **configs: Any) -> list[Launch]:
    """Return the launches of a call with these configurations."""
    with recording(device) as launches, pinned(**configs):
        call()
    return launches


def by_pointers(op: Op, values: dict[str, Any]) -> Any:
    """Return the configuration without descriptors, which the host would have to make, and not persistent."""
    values = {**values, "tma": False, "persistent": False}
    return op.config(**{field.name: values[field.name] for field in fields(op.config) if field.name in values})


def default_of(name: str, dtype: torch.dtype, device: Device, dims: tuple[int, ...]) -> Any:
    """Return the default at the shape that the op looks up."""
    op = OPS[name]
    with listening() as asked:
        recorded(device, partial(op.call, dtype, dims, op.options[0]))
    shape = next(look_up.shape for look_up in asked if look_up.kernel == name)
    tunable = space.KERNELS[name].tunable
    return by_pointers(op, vars(tunable.default(shape, dtype, device)))


def table_rows(op: Op, table: dict[str, Any], bits: int, most: int) -> list[tuple[When, Any]]:
    """Return conditions and configurations of a table's rows, for its `most` most frequent configurations."""
    rows = []
    for row in table["rows"]:
        when = {name: (v, v) if isinstance(v, int) else v for name, v in row["when"].items() if name in op.dims}
        others = {name: v for name, v in row["when"].items() if name not in op.dims and name != "bits"}
        if row["when"].get("bits", bits) == bits and all(v in op.others.get(name, ()) for name, v in others.items()):
            rows.append(({name: (int(v[0]), int(v[1])) for name, v in when.items()}, by_pointers(op, row["config"])))
    frequent = [config for config, _ in Counter(config for _, config in rows).most_common(most)]
    return [row for row in rows if row[1] in frequent]


def rows_of(name: str, target: Target, dtype: torch.dtype, most: int) -> list[tuple[When, Any]]:
    """Return rows, of which the first whose condition holds is used: table, default, the smallest shared memory."""
    op, rows = OPS[name], []
    path = TABLES / name / f"{target.gpu}.json"
    if target.gpu and path.exists():
        rows += table_rows(op, json.loads(path.read_text()), 8 * dtype.itemsize, most)
    if target.gpu:
        rows += [(when, default_of(name, dtype, target.device, dims)) for when, dims in op.ladder]
    if target.device.arch == "sm_80":
        last = [rung for rung in op.ladder if not rung[0]] or op.ladder
        rows += [(when, default_of(name, dtype, SMALL, dims)) for when, dims in last]
    return rows


def calls_of(op: Op, when: When) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Yield options and sizes to record a configuration at, for all constants that its condition allows."""
    for option in op.options:
        dims = op.ladder[-1][1]
        if op.kernel == "_pool_kernel":
            low, high = when.get("channels", ANY)
            yield from ((option, (dims[0], c)) for c in CHANNELS if low <= c and least(c) <= high)
        elif op.kernel != "_embed_kernel" or within(3 * option[0] ** 2, when.get("k", ANY)):
            yield option, dims


def within(n: int, interval: tuple[int, int]) -> bool:
    """Tell whether low ≤ n ≤ high."""
    return interval[0] <= n <= interval[1]


def helpers(dtype: torch.dtype, block_m: set[int]) -> Iterator[Callable[[], object]]:
    """Yield calls that launch the kernels that ops need beside their own."""
    for most, m, tail in product(EXPERTS, sorted(block_m), (False, True)):
        yield partial(tiles.tile_map, empty(most), 1001, m, tail=tail)
    for most in EXPERTS:
        yield partial(route.sort, empty(1001, 2), most)
    for k in TOP_K:
        yield partial(
            combine.combine_sorted,
            empty(2002, 2048, dtype=dtype),
            empty(1001, k),
            empty(5),
            empty(1001, k, dtype=torch.float32),
        )
    for option in OPS["patch_embed"].options:
        yield partial(_embed, dtype, (4001, 0, 1024), option)


def plan(archs: list[str], most: int) -> tuple[dict[Job, Launch], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the jobs, the variants (an op's configuration for a target and dtype), and the rows that choose them."""
    jobs: dict[Job, Launch] = {}
    variants: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for target in targets(archs):
        for number, dtype in enumerate(DTYPES):
            block_m = set()
            for name, op in OPS.items():
                numbers: dict[Any, int] = {}
                for when, config in rows_of(name, target, dtype, most):
                    if config not in numbers:
                        numbers[config] = len(variants)
                        variant = {"op": name, "arch": target.number, "dtype": number, "config": vars(config)}
                        variants.append(variant)
                    rows.append({"when": when, "variant": numbers[config]})
                    block_m.add(getattr(config, "block_m", 0))
                    for option, dims in calls_of(op, when):
                        launches = recorded(target.device, partial(op.call, dtype, dims, option), **{name: config})
                        add(jobs, (x for x in launches if x.name == op.kernel), target, number, numbers[config])
            for call in helpers(dtype, block_m - {0}):
                add(jobs, (x for x in recorded(target.device, call) if x.name in HELPERS), target, number, -1)
    return jobs, variants, rows


def add(jobs: dict[Job, Launch], launches: Iterable[Launch], target: Target, dtype: int, variant: int) -> None:
    """Add the launches to the jobs; raises ValueError if one key would stand for different machine code."""
    for launch in launches:
        typed = any(isinstance(a, torch.Tensor) and a.dtype == DTYPES[dtype] for a in launch.arguments.values())
        key = tuple(int(k) for k in KEYS[launch.name](launch.arguments))
        job = Job(target.number, launch.name, dtype if typed else 0, variant, key)
        first = jobs.setdefault(job, launch)
        if (general(first), first.options) != (general(launch), launch.options):
            raise ValueError(f"KEYS gives two different images one key: {job}")


def general(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility that hold for every call, not for the recorded sizes alone."""
    signature, constants, attributes = specialize(launch)
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or isinstance(value, torch.Tensor) or value is None:
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
        if not MULTIPLES.fullmatch(name) or name in ANY_NUMBER.get(launch.name, ()):
            attributes.pop((i,), None)
        if (i,) in constants and not name.startswith("stride"):  # a size that happened to be 1
            signature[name] = "i32"
            del constants[(i,)]
    return signature, constants, attributes


def compile_image(job: Job, launch: Launch, device: Device, path: Path) -> dict[str, Any]:
    """Compile an image, write it to `path`, and return what the library must know about it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = general(launch)
    amd = device.arch.startswith("gfx")
    target = GPUTarget("hip", device.arch, 64) if amd else GPUTarget("cuda", int(device.arch[3:]), 32)
    compiled: Any = triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target, launch.options)
    facts = compiled.metadata
    scratch = getattr(facts, "global_scratch_size", 0) + getattr(facts, "profile_scratch_size", 0)
    if scratch or facts.num_ctas != 1 or facts.launch_cooperative_grid or getattr(facts, "launch_pdl", False):
        raise ValueError(f"{job.kernel} needs scratch memory, a cluster or a grid that runs at once")
    code = compiled.asm["ptx" if job.target == PTX else "hsaco" if amd else "cubin"]
    path.write_bytes(code.encode() if isinstance(code, str) else code)
    args = [name for name, kind in signature.items() if kind != "constexpr"]
    fixed = {launch.kernel.arg_names[i]: value for (i,), value in constants.items()}
    fixed = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in fixed.items()}
    return {"symbol": facts.name, "shared": facts.shared, "warps": facts.num_warps, "args": args,
            "types": [signature[name] for name in args], "constants": fixed}  # fmt: skip


_jobs: list[tuple[Job, Launch, Device, Path]] = []  # inherited by forked workers, as a launch cannot be pickled


def _compile(i: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return compile_image(*_jobs[i])


def build(out: Path, archs: list[str], most: int, workers: int) -> None:
    """Write images, tables and a manifest to `out`."""
    jobs, variants, rows = plan(archs, most)
    device = {target.number: target.device for target in targets(archs)}
    order = sorted(jobs, key=lambda j: (list(device).index(j.target), KERNELS.index(j.kernel), *j[2:]))
    (out / "images").mkdir(parents=True, exist_ok=True)
    _jobs[:] = [(j, jobs[j], device[j.target], out / "images" / f"{i}.bin") for i, j in enumerate(order)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        facts = list(pool.map(_compile, range(len(order))))
    images = [job._asdict() | fact for job, fact in zip(order, facts)]
    fitting(images, variants, rows, {number: d.shared for number, d in device.items()})
    (out / "images.S").write_text(assembly(len(images), out / "images"))
    (out / "table.h").write_text(tables(images, variants, rows, list(device)))
    manifest = {"triton": triton.__version__, "archs": list(device), "variants": variants, "rows": rows,
                "images": images}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def fitting(images: list[dict], variants: list[dict], rows: list[dict], limit: dict[int, int]) -> None:
    """Store each variant's shared memory, and remove the rows of variants that exceed the GPU's."""
    for i, variant in enumerate(variants):
        variant["shared"] = max(image["shared"] for image in images if image["variant"] == i)
    rows[:] = [r for r in rows if (v := variants[r["variant"]])["shared"] <= limit[v["arch"]]]
    for v in variants:
        if not any(
            variants[r["variant"]]["op"] == v["op"] and variants[r["variant"]]["arch"] == v["arch"] for r in rows
        ):
            raise ValueError(f"{v['op']}: nothing fits {v['arch']}")


def assembly(count: int, folder: Path) -> str:
    """Return assembler source that includes the images as symbols."""
    lines = ['.section .note.GNU-stack,"",%progbits', ".section .rodata"]
    for i in range(count):
        name = f"mm1_image_{i}"
        lines += [f".globl {name}", f".hidden {name}", ".balign 64"]
        lines += [f'{name}: .incbin "{folder / f"{i}.bin"}"', ".byte 0"]  # PTX is a string
    return "\n".join(lines) + "\n"


def braces(values: Iterable[Any]) -> str:
    """Return a C initialiser."""
    return "{" + ", ".join(str(value) for value in values) + "}"


def begins(places: list[int], count: int) -> str:
    """Return where each of `count` groups begins in a list sorted by group, and the end."""
    return braces(sum(place < group for place in places) for group in range(count + 1))


def tables(images: list[dict], variants: list[dict], rows: list[dict], archs: list[int]) -> str:
    """Return C tables: images by (arch, kernel) and rows by (arch, op, dtype), and where each group begins."""
    args = list(dict.fromkeys(name for image in images for name in image["args"]))
    lists = list(dict.fromkeys(tuple(image["args"]) for image in images))
    ops, dims = list(OPS), max(len(op.dims) for op in OPS.values())

    def group(row: dict) -> int:
        v = variants[row["variant"]]
        return (archs.index(v["arch"]) * len(ops) + ops.index(v["op"])) * len(DTYPES) + v["dtype"]

    def choice(row: dict) -> str:
        bounds = [row["when"].get(name, ANY) for name in OPS[variants[row["variant"]]["op"]].dims]
        low, high = zip(*bounds, *[ANY] * (dims - len(bounds)))
        return braces((braces(low), braces(high), row["variant"]))

    def image(n: int, i: dict) -> str:
        names = lists.index(tuple(i["args"]))
        return braces((f"mm1_image_{n}", f'"{i["symbol"]}"', f"args_{names}", len(i["args"]), i["dtype"], i["variant"],
                       braces(i["key"]), i["warps"], i["shared"]))  # fmt: skip

    rows = sorted(rows, key=group)  # stable: the first that holds stays first
    places = [archs.index(i["target"]) * len(KERNELS) + KERNELS.index(i["kernel"]) for i in images]
    kernels = [f"KERNEL_{name.removeprefix('_').removesuffix('_kernel')}" for name in KERNELS]
    shapes = [(v["config"].get("block_m", 0), v["config"].get("block_n", 0), v["shared"]) for v in variants]
    lines = [
        "/* Written by mm1/autotune/ahead.py. */",
        f"enum {braces([*(f'ARG_{name}' for name in args), 'ARGS'])};",
        f"enum {braces([*kernels, 'KERNELS'])};",
        f"enum {{ARCHS = {len(archs)}, OPS = {len(ops)}, DIMS = {dims}, DTYPES = {len(DTYPES)}}};",
        f"enum {{IMAGES = {len(images)}, MOST_ARGS = {max(map(len, lists))}, MOST_BINS = {2 * max(EXPERTS)}}};",
        f"static const short archs[] = {braces(archs)};",
        *(f"static const unsigned char args_{i}[] = {braces(f'ARG_{a}' for a in x)};" for i, x in enumerate(lists)),
        *(f"extern const unsigned char mm1_image_{i}[];" for i in range(len(images))),
        f"static const struct image images[] = {braces(image(n, i) for n, i in enumerate(images))};",
        f"static const short image_begin[] = {begins(places, len(archs) * len(KERNELS))};",
        f"static const struct variant variants[] = {braces(map(braces, shapes))};",
        f"static const struct choice choices[] = {braces(map(choice, rows))};",
        f"static const int choice_begin[] = {begins(list(map(group, rows)), len(archs) * len(ops) * len(DTYPES))};",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for the ahead-of-time library.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archs", default=";".join(GPUS))
    parser.add_argument("--variants", type=int, default=4, help="configurations taken from a table, at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(options.out.absolute() / "cache"))
    build(options.out.absolute(), options.archs.split(";"), options.variants, options.workers)


if __name__ == "__main__":
    main()
