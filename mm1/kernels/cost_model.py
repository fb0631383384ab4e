"""Predict the seconds of a configuration, to rank candidates; the times themselves are rough.

A tiled product runs in waves: as many programs share a multiprocessor as shared memory and registers allow. A step of a
program's reduction takes the longest of multiplying, moving operands from L2, reading them from shared memory, and the
memory latency that its pipeline does not hide. The total is at least the time to move all bytes once. A kernel over
rows is limited by bandwidth, if enough bytes are in flight. The constants are round figures from microbenchmarks of
Hopper.
"""

from math import ceil

from mm1.kernels.device import Device

LATENCY = 0.5e-6  # seconds of a load
L2_RATE = 2.2  # ratio of the bandwidths of L2 and memory
START = 1.5e-6  # seconds of a program for its first loads and last stores
LAUNCH = 3e-6  # seconds to launch a kernel
SHARED_RATE = 128 * 1.7e9  # bytes a second of one multiprocessor's shared memory
REGISTERS = 65536  # in a multiprocessor; AMD's compute units have twice as many


def resident(shared: int, registers: float, warps: int, device: Device) -> int:
    """Return how many programs run on a multiprocessor at once.

    shared: bytes of shared memory a program. registers: per thread; warps: per program.
    """
    threads = warps * device.warp
    file = REGISTERS * (2 if device.vendor == "amd" else 1)
    fits = (device.shared + 1024) // (shared + 1024), file // (min(registers, 255) * threads), 2048 // threads
    return max(1, int(min(fits)))


def product_seconds(
    tiles: float, depth: int, m: int, n: int, k: int, warps: int, stages: int, shared: int, moved: int, itemsize: int,
    device: Device, finish: int = 1,
) -> float:  # fmt: skip
    """Predict the seconds of a tiled product.

    tiles: number of tiles m × n, each a reduction over `depth` in steps of k. shared: bytes of shared memory a program.
    moved: bytes read from and written to memory at least. finish: elements a program moves at its end for each result.
    """
    if tiles <= 0:
        return LAUNCH
    sums = m * n / (warps * device.warp)
    together = resident(shared, sums + 64, warps, device)
    rows = m // max(1, warps // 4)  # of a warp group
    full_rate = device.tflops * 1e12 / device.units
    if itemsize == 4:
        full_rate /= 16  # without matrix units
    elif device.wgmma and (m < 64 or rows < 64):
        full_rate *= 0.6  # mma.sync
    elif m < 64:
        full_rate *= m / 64 * 0.8 + 0.2
    operands = (m + n) * k * itemsize
    group = max(1, warps // 4) if device.asynchronous else warps**0.5
    again = (m + n * group) * k * itemsize if device.asynchronous else (m + n) * k * itemsize * group
    steps = max(1, ceil(depth / k))

    def wave(c: int) -> float:
        step = c * max(
            2 * m * n * k / full_rate,
            operands * device.units / (L2_RATE * device.bandwidth * 1e9),
            (operands + again) / SHARED_RATE,
        )
        # With one stage a program waits for each step's operands.
        step = max(step, LATENCY / (stages - 1)) if stages > 1 else max(step, step / c + LATENCY)
        stored = c * finish * m * n * itemsize * device.units / (L2_RATE * device.bandwidth * 1e9)
        return START + steps * step + stored

    slots = device.units * together
    waves, rest = divmod(ceil(tiles), slots)
    seconds = waves * wave(together) + (wave(ceil(rest / device.units)) if rest else 0.0)
    return LAUNCH + max(seconds, moved / (device.bandwidth * 1e9))


def rows_seconds(
    rows: int, width: int, at_once: int, tensors: int, each: float, warps: int, programs: int | None, itemsize: int,
    device: Device,
) -> float:  # fmt: skip
    """Predict the seconds of a kernel that moves `tensors` tensors of [rows, width].

    at_once: rows that a program holds, in `each` registers an element. programs: programs that a persistent kernel runs
    on a multiprocessor; None for a kernel that is not persistent.
    """
    registers = 32 + each * at_once * width / (warps * device.warp)
    together = resident(0, registers, warps, device)
    together = together if programs is None else min(programs, together)
    in_flight = together * at_once * width * itemsize * max(1, tensors - 1) / 2
    needed = LATENCY * device.bandwidth * 1e9 / device.units
    waves = ceil(max(1, rows) / (at_once * together * device.units))
    moved = max(1, rows) * width * itemsize * tensors
    latency = waves * (LATENCY + warps * 2e-8)  # sums over a row combine all its warps
    spilled = 1 + max(0.0, registers - 255) / 64
    return LAUNCH + spilled * max(moved / (device.bandwidth * 1e9) / min(1.0, in_flight / needed), latency)
