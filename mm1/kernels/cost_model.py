"""Predicted seconds of a configuration: to rank candidates, not to promise times.

A tiled product: programs share a multiprocessor as far as shared memory and registers allow, and go in waves; a step of
a program's reduction takes the longest of multiplying, moving its operands from L2, reading them from shared memory,
and what its pipeline leaves of the memory's latency. Never faster than the memory moves what must be moved. A kernel of
rows is bandwidth, as far as enough bytes are under way. The constants are round figures of Hopper's microbenchmarks.
"""

from math import ceil

from mm1.kernels.device import Device

LATENCY = 0.5e-6  # of a load
L2_RATE = 2.2  # times memory's, of operands that several programs read
START = 1.5e-6  # of a program: its first loads, then its last stores
LAUNCH = 3e-6
SHARED_RATE = 128 * 1.7e9  # bytes a second of one multiprocessor's shared memory
REGISTERS = 65536  # of a multiprocessor; AMD's compute units hold twice as many


def resident(shared: int, registers: float, warps: int, device: Device) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = warps * device.warp
    file = REGISTERS * (2 if device.vendor == "amd" else 1)
    fits = (device.shared + 1024) // (shared + 1024), file // (min(registers, 255) * threads), 2048 // threads
    return max(1, int(min(fits)))


def product_seconds(
    tiles: float, depth: int, m: int, n: int, k: int, warps: int, stages: int, shared: int, moved: int, itemsize: int,
    device: Device, finish: int = 1,
) -> float:  # fmt: skip
    """tiles of m × n, each a reduction over `depth` in steps of k; moved: bytes that memory moves at least; finish:
    elements that the end of a program moves for each of its results."""
    if tiles <= 0:
        return LAUNCH
    sums = m * n / (warps * device.warp)
    together = resident(shared, sums + 64, warps, device)
    rows = m // max(1, warps // 4)  # of a warp group
    full_rate = device.tflops * 1e12 / device.units
    if itemsize == 4:
        full_rate /= 16  # single multiplications
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
        # Without a second stage a program waits for each step's operands.
        step = max(step, LATENCY / (stages - 1)) if stages > 1 else max(step, step / c + LATENCY)
        stored = c * finish * m * n * itemsize * device.units / (L2_RATE * device.bandwidth * 1e9)
        return START + steps * step + stored

    slots = device.units * together
    whole, left = divmod(ceil(tiles), slots)
    seconds = whole * wave(together) + (wave(ceil(left / device.units)) if left else 0.0)
    return LAUNCH + max(seconds, moved / (device.bandwidth * 1e9))


def rows_seconds(
    rows: int, width: int, held: int, tensors: int, each: float, warps: int, programs: int | None, itemsize: int,
    device: Device,
) -> float:  # fmt: skip
    """A kernel over `rows` of `width` elements of several tensors, `held` rows a program at once, in so many registers
    `each` element; programs: how many a multiprocessor has, where they walk."""
    registers = 32 + each * held * width / (warps * device.warp)
    together = resident(0, registers, warps, device)
    together = together if programs is None else min(programs, together)
    under_way = together * held * width * itemsize * max(1, tensors - 1) / 2
    needed = LATENCY * device.bandwidth * 1e9 / device.units
    waves = ceil(max(1, rows) / (held * together * device.units))
    moved = max(1, rows) * width * itemsize * tensors
    latency = waves * (LATENCY + warps * 2e-8)  # sums over a row go through all its warps
    spilled = 1 + max(0.0, registers - 255) / 64
    return LAUNCH + spilled * max(moved / (device.bandwidth * 1e9) / min(1.0, under_way / needed), latency)
