"""Predict the seconds of a configuration, to rank candidates; the times themselves are rough.

A program of a tiled product takes the sum of its ends and its steps. Ends: its start, the first load, and the stores
and their instructions, during which its matrix units rest. A step of its reduction takes the longest of multiplying,
issuing instructions, moving operands from L2, reading them from shared memory, and the memory latency that its pipeline
does not hide. Programs that share a multiprocessor add up their work, but the ends of one run under the steps of
another; as many share it as shared memory, registers and threads allow. Programs run in waves, and the total is at
least the time to move all bytes once. A kernel over rows is limited by bandwidth, by the instructions
that it issues, or, with few programs, by the latency of each step.

Instructions and registers are those of the machine code where it is known (`Code`), else estimates, fitted to the code
of this project's kernels for sm_90. BY_WAY and SPREAD were chosen to agree with published measurements on H200, which
tests/test_cost_model.py lists. The other constants are round figures from microbenchmarks of Hopper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, erfc, exp, sqrt
from typing import Any, NamedTuple

from mm1.kernels.device import Device

LATENCY = 0.6e-6  # seconds of a load
START = 1.0e-6  # seconds until a program's first load: launch, addresses, the map of tiles
LAUNCH = 3e-6  # seconds to launch a kernel
SHARED_BYTES = 128  # a clock of one multiprocessor's shared memory
REGISTERS = 65536  # in a multiprocessor; AMD's compute units have twice as many
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of one warp a clock
WARP_CLOCKS = 2  # between two instructions of one warp, with some of them independent
SUSTAINED = 0.8  # share of the vendor's rate of products that cuBLAS's best product reaches on H100: 794 of 989 TFLOP/s
COPIED = 0.9  # share of the vendor's bandwidth of memory that a copy reaches
SPREAD = 0.3  # standard deviation of an expert's rows over their mean, as a router leaves it
OTHERS = 64  # registers of a thread besides its sums
STEP = 75  # instructions of a step besides products and loads by addresses
ENDS = 250  # instructions of a program besides its steps and those for each sum
BY_WAY = 2  # further passes through shared memory of bytes loaded by addresses: they cross L1, which is the same memory
COPY = 12  # instructions to load 16 bytes by addresses


class Code(NamedTuple):
    """Hold what the machine code of a kernel shows; instructions are those of one warp."""

    registers: int
    step: float  # instructions of a step of the reduction, or of all rows that a program holds at once
    ends: float = 0.0  # instructions before and after all steps


class Times(NamedTuple):
    """Hold the parts of a program's time in seconds, and the number of programs on a multiprocessor."""

    step: float  # of a program that has the multiprocessor to itself
    work: float  # of a step: what programs on one multiprocessor cannot do at the same time
    ends: float
    steps: int
    programs: int

    @property
    def alone(self) -> float:
        """Return the seconds of a program that has the multiprocessor to itself."""
        return self.ends + self.steps * self.step

    @property
    def in_loop(self) -> float:
        """Return the share of the multiprocessor's time in which some program runs its loop."""
        return min(1.0, self.programs * self.steps * self.step / self.alone)


def resident(shared: int, registers: float, warps: int, device: Device) -> int:
    """Return how many programs run on a multiprocessor at once.

    shared: bytes of shared memory a program. registers: per thread; warps: per program.
    """
    threads = warps * device.warp
    file = REGISTERS * (2 if device.vendor == "amd" else 1)
    allocated = ceil(min(registers, 255) / 8) * 8  # a thread's registers are multiples of 8
    fits = (device.shared + 1024) // (shared + 1024), file // (allocated * threads), 2048 // threads
    return max(1, int(min(fits)))


def memory_seconds(moved: float, device: Device) -> float:
    """Return the seconds of reading and writing `moved` bytes of memory."""
    return moved / (COPIED * device.bandwidth * 1e9)


@lru_cache(4096)
def expert_tiles(rows: int, experts: int, block: int) -> tuple[float, float]:
    """Return the expected numbers of tiles of `block` rows, and of experts with rows.

    Rows of an expert are normally distributed around their mean, with the deviation of random choices and SPREAD. So
    tiles as high as the mean would often need a second one.
    """
    if experts <= 1:
        return -(-rows // block), 1
    mean = rows / experts
    used = experts * (1 - exp(-mean))
    deviation = sqrt(2 * (mean + (SPREAD * mean) ** 2))

    def beyond(j: int) -> float:
        """Return the share of experts with more than j tiles."""
        return erfc((j * block + 0.5 - mean) / deviation) / 2

    more = sum(beyond(j) for j in range(1, ceil((mean + 4 * deviation) / block))) if mean < 20 * block else 0.0
    return (used + experts * more if mean < 20 * block else rows / block + experts / 2), used


@dataclass(frozen=True)
class Product:
    """Describe a tiled product: sizes, options of its programs, and the work beside the products themselves."""

    tiles: float  # of m × n results, each a reduction over `depth` in steps of k
    depth: int
    m: int
    n: int
    k: int
    warps: int
    stages: int
    shared: int  # bytes of shared memory a program
    moved: float  # bytes read from and written to memory at least
    itemsize: int
    fetched: float | None = None  # elements of a step's operands that come from L2; None: all
    addressed: float = 0.0  # elements of a step's operands that are loaded by addresses, 16 bytes at a time
    loading: float = 0.0  # further instructions a thread and step
    products: int = 1  # in a step, all of m × n × k
    finish: float = 1.0  # elements that a program moves at its end for each result
    finishing: float = 2.2  # instructions a thread for each result
    programs: int | None = None  # maximum on a multiprocessor
    beside: float = 0.0  # seconds of other kernels

    @property
    def operations(self) -> int:
        """Return the floating-point operations of a step."""
        return 2 * self.products * self.m * self.n * self.k

    def estimate(self, device: Device) -> Code:
        """Return the expected machine code."""
        threads = self.warps * device.warp
        sums, multiplied = self.m * self.n / threads, self.products * self.m * self.n * self.k
        if self.itemsize == 4:
            multiply = multiplied / threads
        elif device.asynchronous and self.m >= 64:
            multiply = multiplied / (64 * min(self.n, 256) * 16) / max(1, self.warps // 4)
        else:  # two instructions for each three products of 16 × 8 × 16 load their operands
            multiply = 1.5 * multiplied / 2048 / self.warps
        loading = COPY * self.addressed * self.itemsize / 16 / threads + self.loading
        return Code(min(255, int(sums + OTHERS)), STEP + multiply + loading, ENDS + self.finishing * sums)

    def times(self, device: Device, code: Code | None = None) -> Times:
        """Predict the parts of the time of one program. code: of its kernel, if it was compiled."""
        code = code or self.estimate(device)
        together = resident(self.shared, code.registers, self.warps, device)
        # A multiprocessor's port carries twice its share of L2's bandwidth, which it gets if others have no program.
        l2 = device.l2 * 1e9 / max(min(device.units, self.tiles), device.units / 2)
        operands = (self.m + self.n) * self.k
        fetched = operands if self.fetched is None else self.fetched
        group = max(1, self.warps // 4) if device.asynchronous else self.warps**0.5
        again = self.products * ((self.m + self.n * group) * self.k if device.asynchronous else operands * group)
        work = max(
            self.operations / self._rate(device),
            code.step * self.warps / SCHEDULERS / device.clock,
            fetched * self.itemsize / l2,
            (fetched + again + BY_WAY * self.addressed) * self.itemsize / (SHARED_BYTES * device.clock),
        )
        # With one stage a program waits for each step's operands.
        hidden = LATENCY / (self.stages - 1) if self.stages > 1 else work + LATENCY
        issue, stores = code.ends / device.clock, self.finish * self.m * self.n * self.itemsize / l2
        return Times(
            max(work, hidden, code.step * WARP_CLOCKS / device.clock), work,
            START + LATENCY + issue * max(WARP_CLOCKS, self.warps / SCHEDULERS) + stores,
            max(1, ceil(self.depth / self.k)), together if self.programs is None else min(together, self.programs),
        )  # fmt: skip

    def seconds(self, device: Device, code: Code | None = None) -> float:
        """Predict the seconds of the whole product. code: of its kernel, if it was compiled."""
        if self.tiles <= 0:
            return LAUNCH + self.beside
        t = self.times(device, code)
        busy = t.steps * t.work + t.ends - START - LATENCY  # what programs on a multiprocessor do one after the other

        def wave(programs: int) -> float:
            return max(t.alone, programs * busy)

        waves, rest = divmod(ceil(self.tiles), device.units * t.programs)
        seconds = waves * wave(t.programs) + (wave(ceil(rest / device.units)) if rest else 0.0)
        return LAUNCH + self.beside + max(seconds, memory_seconds(self.moved, device))

    def _rate(self, device: Device) -> float:
        """Return the operations a second of one multiprocessor for tiles of this size."""
        rate = SUSTAINED * device.tflops * 1e12 / device.units
        if self.itemsize == 4:
            return rate / 16  # without matrix units
        if device.wgmma and self.m // max(1, self.warps // 4) < 64:  # rows of a warp group
            return rate * 0.6  # mma.sync
        return rate * (self.m / 64 * 0.8 + 0.2) if self.m < 64 else rate


@dataclass(frozen=True)
class Rows:
    """Describe a kernel that moves `tensors` tensors of [rows, width]."""

    rows: int
    width: int
    at_once: int  # rows that a program holds
    tensors: int
    each: float  # registers of an element
    warps: int
    programs: int | None  # that a persistent kernel runs on a multiprocessor; None for a kernel that is not persistent
    itemsize: int

    @property
    def moved(self) -> int:
        """Return the bytes read from and written to memory at least."""
        return max(1, self.rows) * self.width * self.itemsize * self.tensors

    def seconds(self, device: Device, code: Code | None = None) -> float:
        """Predict the seconds of one run. code: of its kernel, if it was compiled."""
        elements = self.at_once * self.width / (self.warps * device.warp)
        registers = 32 + self.each * elements
        spilled = 1.0 if code else 1 + max(0.0, registers - 255) / 64
        code = code or Code(min(255, int(registers)), 100 + 6 * self.each * elements)
        together = resident(0, code.registers, self.warps, device)
        together = together if self.programs is None else min(self.programs, together)
        steps = ceil(max(1, self.rows) / self.at_once / device.units)  # of a multiprocessor
        issue, memory = code.step / device.clock, memory_seconds(self.moved, device)
        # A program loads, computes and stores one after the other; sums over a row combine all its warps.
        alone = LATENCY + issue * WARP_CLOCKS + self.warps * 2e-8
        return LAUNCH + spilled * max(memory, steps * issue * self.warps / SCHEDULERS, ceil(steps / together) * alone)


@dataclass(frozen=True)
class Predicted:
    """Predict seconds from the work that a configuration does."""

    work: Callable[[Any, Any, Any, Device], Product | Rows]  # (config, shape, dtype, device)

    def __call__(self, config: Any, shape: Any, dtype: Any, device: Device, code: Code | None = None) -> float:
        """Predict the seconds of one run. code: of the kernel, if it was compiled."""
        return self.work(config, shape, dtype, device).seconds(device, code)
