"""Compile the forward kernels ahead of time, without a GPU, and write the C tables by which native/mm1.c finds them.

    python -m mm1.autotune.ahead --out build/code --archs "80;90;100;120;gfx942"

Each op is recorded with tensors on "meta", and its launches are compiled for every configuration in the GPU's table
and for the op's defaults. An image is one compiled kernel. Images of one kernel differ by their key (KEYS); everything
else of a shape is an argument. Arguments are passed by name, so that native/mm1.c follows changes of a kernel's
arguments or does not compile.
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
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # reduces the images to a third of their size

import torch

from mm1.autotune import space
from mm1.autotune.static import specialize, target_of
from mm1.autotune.tables import TABLES
from mm1.kernels import tiles
from mm1.kernels.abstractor import pooling
from mm1.kernels.abstractor.rows import Config as RowConfig
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import Launch, recording
from mm1.kernels.language import triton
from mm1.kernels.moe import combine, experts, grouped, routing
from mm1.kernels.patches import embedding
from mm1.kernels.patches.pixels import CUT_ROWS, CUT_VALUES
from mm1.kernels.tiles import MAP_PAIRS, MAP_SIDE
from mm1.kernels.tuning import listening, pinned

GPUS = {"80": "a100", "90": "h200", "100": "b200", "120": "rtx5090", "gfx942": "mi300x"}
SMALL = replace(DEVICES["a100"], name="small", shared=99 << 10)  # the smallest shared memory of all GPUs since sm_80
PTX = 0  # number of the target "any newer GPU"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their number in mm1.h
TOP_K = (2, 8)  # experts per token
EXPERTS = (8, 64, 256)  # upper bounds: a number between two of them runs as the larger one
CHANNELS = (1024, 2048, 4096)  # upper bounds of the channels to pool
PATCHES = (14, 16)  # pixels per side
PLACES = ((8, 8), (12, 12))  # grids to pool to
ANY = (0, 2**31 - 1)

When = dict[str, tuple[int, int]]


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Return a tensor on "meta"."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _gemm(dtype: torch.dtype, dims: tuple[int, ...], transposed: bool) -> None:
    rows, experts, k, n = dims
    b = empty(experts, n, k, dtype=dtype).transpose(1, 2) if transposed else empty(experts, k, n, dtype=dtype)
    grouped.gemm(empty(rows, k, dtype=dtype), b, empty(experts), tail=True)


def _moe(dtype: torch.dtype, dims: tuple[int, ...], k: int) -> None:
    slots, E, D, F = dims
    x, weight = empty(slots // k, D, dtype=dtype), empty(slots // k, k, dtype=torch.float32)
    gate_up, down = empty(E, 2 * F, D, dtype=dtype), empty(E, D, F, dtype=dtype)
    order = empty(slots), empty(slots // k, k), empty(E)
    experts.moe_mlp_forward(x, order, weight, gate_up, None, down, None, None, "silu", None, 0.0, False, False)


def _embed(dtype: torch.dtype, dims: tuple[int, ...], option: tuple[int, bool, bool]) -> None:
    P, _, width = dims
    patch, has_table, has_bias = option
    pixels, weight = empty(P * patch**2, 3, dtype=torch.uint8), empty(width, 3 * patch**2, dtype=dtype)
    bias = empty(width, dtype=dtype) if has_bias else None
    table = empty(27, 27, width, dtype=dtype) if has_table else None
    mode = ("bilinear", True, False) if has_table else ("nearest", False, False)
    fold = [1.5, 2.5, 3.5], [0.1, 0.2, 0.3]
    embedding.forward(pixels, weight, bias, table, empty(5, 4), empty(P), patch, *fold, 1, *mode)


def _pool(dtype: torch.dtype, dims: tuple[int, ...], out: tuple[int, int]) -> None:
    P, C = dims
    pooling.forward(empty(P, C, dtype=dtype), empty(5, 4), empty(P), *out)


@dataclass(frozen=True)
class Op:
    """Describe an op with configurations. The size `each` in its conditions is the number of rows per expert."""

    kernel: str
    dims: tuple[str, ...]
    others: dict[str, tuple[Any, ...]]  # other fields of a table's row, and their values in the library's calls
    config: type
    call: Callable[..., None]
    options: tuple[Any, ...]
    ladder: tuple[tuple[When, tuple[int, ...]], ...]  # conditions where the default changes, with example sizes


# A size that is an argument and need not be a multiple of 16 is odd here, and never 1.
_RUNGS = tuple(({"each": (0, m)} if m <= 64 else {}, (5 * m, 5, 2048, 1024)) for m in (16, 32, 64, 1001))
_BY_ROWS = ("rows", "experts", "k", "n", "each")
OPS = {
    "grouped_gemm": Op("_gemm_kernel", _BY_ROWS, {"gated": (False,)}, tiles.Config, _gemm, (False, True), _RUNGS),
    "experts_up": Op("_up_kernel", _BY_ROWS, {"gated": (True,)}, tiles.Config, _moe, TOP_K, _RUNGS),
    "patch_embed": Op(
        "_embed_kernel", ("patches", "k", "width"), {}, tiles.Config, _embed,
        tuple((p, table, bias) for p in PATCHES for table, bias in ((False, True), (True, False))),
        (({}, (4001, 588, 1024)),),
    ),
    "adaptive_pool": Op(
        "_pool_kernel", ("rows", "channels"), {}, RowConfig, _pool, PLACES,
        tuple(({"channels": (low + 1 if low else 0, c)}, (4001, c)) for low, c in pairwise((0, *CHANNELS))),
    ),
}  # fmt: skip

# An image is found by dtype, configuration and this key. Among images that fit, the one with the smallest last part of
# the key is used.
KEYS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "_gemm_kernel": lambda v: (v["stride_bk"] == 1, 0, 0),
    "_up_kernel": lambda v: (v["FAN"], 0, 0),
    "_embed_kernel": lambda v: (v["K"], v["HAS_TABLE"], 0),
    "_pool_kernel": lambda v: (v["OH"], v["OW"], v["BLOCK_C"]),
    "_map_kernel": lambda v: (v["TAIL"], v["BLOCK_M"], v["BLOCK_E"]),
    "_count_kernel": lambda v: (0, 0, v["BINS"]),
    "_place_kernel": lambda v: (0, 0, v["BINS"]),
    "_combine_kernel": lambda v: (v["K"], v["BLOCK"], 0),
    "_cut_kernel": lambda v: (v["PATCH"], v["HAS_TABLE"], 0),
    "_fold_kernel": lambda v: (v["HAS_BIAS"], 0, 0),
}
KERNELS = tuple(KEYS)
HELPERS = set(KERNELS) - {op.kernel for op in OPS.values()}
# Names of integers that are multiples of 16 in every call, which the library checks.
MULTIPLES = re.compile(r"stride_\w+|K|N|D|F|C|CHUNK|K_PADDED")
ANY_NUMBER = {"_fold_kernel": ("K", "stride_n")}  # except these, which may be 588


class Target(NamedTuple):
    """Hold a GPU to compile for."""

    number: int  # compute capability, 942 for gfx942, or PTX
    device: Device
    gpu: str | None  # the GPU whose table is used


class Job(NamedTuple):
    """Name one image to compile."""

    target: int
    kernel: str
    dtype: int
    variant: int  # index into all variants, or -1 for a kernel without configurations
    key: tuple[int, ...]


def targets(archs: list[str]) -> list[Target]:
    """Return the targets of these architectures, and PTX for newer GPUs if "80" is among them."""
    result = [Target(int(arch.removeprefix("gfx")), DEVICES[GPUS[arch]], GPUS[arch]) for arch in archs]
    return [*([Target(PTX, SMALL, None)] if "80" in archs else []), *result]


def recorded(device: Device, call: Callable[[], object], **configs: Any) -> list[Launch]:
    """Return the launches of a call with these configurations."""
    with recording(device) as launches, pinned(**configs):
        call()
    return launches


def by_pointers(op: Op, values: dict[str, Any]) -> Any:
    """Return the configuration without descriptors, which the host would have to make, and without persistence."""
    values = {**values, "tma": False, "persistent": False}
    return op.config(**{field.name: values[field.name] for field in fields(op.config) if field.name in values})


def default_of(name: str, dtype: torch.dtype, device: Device, dims: tuple[int, ...]) -> Any:
    """Return the default configuration for the shape that the op looks up at these sizes."""
    op = OPS[name]
    with listening() as asked:
        recorded(device, partial(op.call, dtype, dims, op.options[0]))
    shape = next(look_up.shape for look_up in asked if look_up.kernel == name)
    tunable = space.KERNELS[name].tunable
    return by_pointers(op, vars(tunable.default(shape, dtype, device)))


def table_rows(op: Op, table: dict[str, Any], bits: int, count: int) -> list[tuple[When, Any]]:
    """Return conditions and configurations of the rows whose configuration is among the `count` most frequent."""
    rows = []
    for row in table["rows"]:
        when = {name: (v, v) if isinstance(v, int) else v for name, v in row["when"].items() if name in op.dims}
        others = {name: v for name, v in row["when"].items() if name not in op.dims and name != "bits"}
        if row["when"].get("bits", bits) == bits and all(v in op.others.get(name, ()) for name, v in others.items()):
            rows.append(({name: (int(v[0]), int(v[1])) for name, v in when.items()}, by_pointers(op, row["config"])))
    frequent = [config for config, _ in Counter(config for _, config in rows).most_common(count)]
    return [row for row in rows if row[1] in frequent]


def rows_of(name: str, target: Target, dtype: torch.dtype, count: int) -> list[tuple[When, Any]]:
    """Return the rows for a target, of which the library uses the first whose condition holds.

    Rows of the table come first, then those of the default, then those of the default for the smallest shared memory.
    """
    op, rows = OPS[name], []
    path = TABLES / name / f"{target.gpu}.json"
    if target.gpu and path.exists():
        rows += table_rows(op, json.loads(path.read_text()), 8 * dtype.itemsize, count)
    if target.gpu:
        rows += [(when, default_of(name, dtype, target.device, dims)) for when, dims in op.ladder]
    if target.device.arch == "sm_80":
        last = [rung for rung in op.ladder if not rung[0]] or op.ladder
        rows += [(when, default_of(name, dtype, SMALL, dims)) for when, dims in last]
    return rows


def calls_of(op: Op, when: When) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Yield options and sizes to record a configuration with, for all constants that its condition allows."""
    (low, high), (low_k, high_k) = (when.get(name, ANY) for name in ("channels", "k"))
    for option in op.options:
        if op.kernel == "_pool_kernel":
            widths = ((dims, *bounds["channels"]) for bounds, dims in op.ladder)
            yield from ((option, dims) for dims, first, last in widths if low <= last and first <= high)
        elif op.kernel != "_embed_kernel" or low_k <= 3 * option[0] ** 2 <= high_k:
            yield option, op.ladder[-1][1]


def helpers(dtype: torch.dtype, block_m: set[int]) -> Iterator[Callable[[], object]]:
    """Yield calls that launch the kernels without configurations, which the ops need too."""
    for bound, m, tail in product(EXPERTS, sorted(block_m), (False, True)):
        yield partial(tiles.tile_map, empty(bound), 1001, m, tail=tail)
    for bound in EXPERTS:
        yield partial(routing.sort, empty(1001, 2), bound)
    for k in TOP_K:
        y, weight = empty(2002, 2048, dtype=dtype), empty(1001, k, dtype=torch.float32)
        yield partial(combine.combine, y, empty(1001, k), weight, offsets=empty(5))
    for option in OPS["patch_embed"].options:
        yield partial(_embed, dtype, (4001, 0, 1024), option)


def plan(archs: list[str], count: int) -> tuple[dict[Job, Launch], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the jobs, the variants (configurations of an op for a target and dtype), and the rows that choose them."""
    jobs: dict[Job, Launch] = {}
    variants: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for target in targets(archs):
        for number, dtype in enumerate(DTYPES):
            block_m = set()
            for name, op in OPS.items():
                numbers: dict[Any, int] = {}
                for when, config in rows_of(name, target, dtype, count):
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
    """Add the launches to the jobs. Raises ValueError if one key would identify different machine code."""
    for launch in launches:
        typed = any(isinstance(a, torch.Tensor) and a.dtype == DTYPES[dtype] for a in launch.arguments.values())
        key = tuple(int(k) for k in KEYS[launch.name](launch.arguments))
        job = Job(target.number, launch.name, dtype if typed else 0, variant, key)
        first = jobs.setdefault(job, launch)
        if (general(first), first.options) != (general(launch), launch.options):
            raise ValueError(f"KEYS gives two different images one key: {job}")


def general(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility that hold for every call, not only for the recorded sizes."""
    signature, constants, attributes = specialize(launch)
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or isinstance(value, torch.Tensor) or value is None:
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
        if not MULTIPLES.fullmatch(name) or name in ANY_NUMBER.get(launch.name, ()):
            attributes.pop((i,), None)
        if (i,) in constants and not name.startswith("stride"):  # the recorded size is 1 by chance
            signature[name] = "i32"
            del constants[(i,)]
    return signature, constants, attributes


def compile_image(job: Job, launch: Launch, device: Device, path: Path) -> dict[str, Any]:
    """Compile an image, write it to `path`, and return its entry in the manifest."""
    from triton.compiler import ASTSource

    signature, constants, attributes = general(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target_of(device), launch.options)
    facts = compiled.metadata
    scratch = getattr(facts, "global_scratch_size", 0) + getattr(facts, "profile_scratch_size", 0)
    if scratch or facts.num_ctas != 1 or facts.launch_cooperative_grid or getattr(facts, "launch_pdl", False):
        raise ValueError(
            f"{job.kernel} needs scratch memory, a cluster or a cooperative grid, which libmm1 cannot launch"
        )
    code = compiled.asm["ptx" if job.target == PTX else "hsaco" if device.vendor == "amd" else "cubin"]
    path.write_bytes(code.encode() if isinstance(code, str) else code)
    args = [name for name, kind in signature.items() if kind != "constexpr"]
    fixed = {launch.kernel.arg_names[i]: value for (i,), value in constants.items()}
    fixed = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in fixed.items()}
    return {"symbol": facts.name, "shared": facts.shared, "warps": facts.num_warps, "args": args,
            "types": [signature[name] for name in args], "constants": fixed}  # fmt: skip


_jobs: list[tuple[Job, Launch, Device, Path]] = []  # forked workers inherit it, because a launch cannot be pickled


def _compile(i: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return compile_image(*_jobs[i])


def build(out: Path, archs: list[str], count: int, workers: int) -> None:
    """Write images, tables and a manifest to `out`. count: maximum number of configurations from a table."""
    jobs, variants, rows = plan(archs, count)
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
    """Store each variant's shared memory, and remove the rows whose variant exceeds the GPU's."""
    for i, variant in enumerate(variants):
        variant["shared"] = max(image["shared"] for image in images if image["variant"] == i)
    rows[:] = [r for r in rows if (v := variants[r["variant"]])["shared"] <= limit[v["arch"]]]
    present = {(v["op"], v["arch"]) for v in (variants[r["variant"]] for r in rows)}
    for v in variants:
        if (v["op"], v["arch"]) not in present:
            raise ValueError(f"{v['op']}: nothing fits {v['arch']}")


def assembly(count: int, folder: Path) -> str:
    """Return assembler source that includes the images as symbols. Each ends with a zero, as PTX is a string."""
    lines = ['.section .note.GNU-stack,"",%progbits', ".section .rodata"]
    for i in range(count):
        name = f"mm1_image_{i}"
        lines += [f".globl {name}", f".hidden {name}", ".balign 64"]
        lines += [f'{name}: .incbin "{folder / f"{i}.bin"}"', ".byte 0"]
    return "\n".join(lines) + "\n"


def braces(values: Iterable[Any]) -> str:
    """Return a C initialiser."""
    return "{" + ", ".join(str(value) for value in values) + "}"


def begins(places: list[int], count: int) -> str:
    """Return as a C initialiser where each of `count` groups begins in a list sorted by group, and the end."""
    return braces(sum(place < group for place in places) for group in range(count + 1))


def tables(images: list[dict], variants: list[dict], rows: list[dict], archs: list[int]) -> str:
    """Return C tables: images grouped by (arch, kernel), rows grouped by (arch, op, dtype), and where groups begin."""
    args = list(dict.fromkeys(name for image in images for name in image["args"]))
    lists = list(dict.fromkeys(tuple(image["args"]) for image in images))
    assert MAP_PAIRS // max(EXPERTS) >= MAP_SIDE  # so that a program of the map kernel always assigns MAP_SIDE tiles
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

    rows = sorted(rows, key=group)  # a stable sort, so that the first row that holds stays first
    places = [archs.index(i["target"]) * len(KERNELS) + KERNELS.index(i["kernel"]) for i in images]
    kernels = [f"KERNEL_{name.removeprefix('_').removesuffix('_kernel')}" for name in KERNELS]
    shapes = [(v["config"].get("block_m", 0), v["config"].get("block_n", 0), v["shared"]) for v in variants]
    lines = [
        "/* Written by mm1/autotune/ahead.py. */",
        f"enum {braces([*(f'ARG_{name}' for name in args), 'ARGS'])};",
        f"enum {braces([*kernels, 'KERNELS'])};",
        f"enum {{ARCHS = {len(archs)}, OPS = {len(ops)}, DIMS = {dims}, DTYPES = {len(DTYPES)}}};",
        f"enum {{IMAGES = {len(images)}, MOST_ARGS = {max(map(len, lists))}, MOST_BINS = {2 * max(EXPERTS)}}};",
        f"enum {{MAP_SIDE = {MAP_SIDE}, CUT_ROWS = {CUT_ROWS}, CUT_VALUES = {CUT_VALUES}}};",
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
    """Build the library's code from the command line."""
    parser = argparse.ArgumentParser(description="Compile the kernels for the ahead-of-time library.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archs", default=";".join(GPUS))
    parser.add_argument("--variants", type=int, default=4, help="maximum number of configurations from a table")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(options.out.absolute() / "cache"))
    build(options.out.absolute(), options.archs.split(";"), options.variants, options.workers)


if __name__ == "__main__":
    main()
