"""Read NVIDIA machine code: find its main loop, and count what one step of it and the rest of a tile execute.

A warp scheduler issues one instruction of one warp a clock, and a multiprocessor has four. So a loop of n instructions
in a program of w warps takes n · w / 4 issue clocks a step, whatever else it waits for.
"""

import heapq
import re
from dataclasses import dataclass
from itertools import pairwise

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)[^;`]*(?:`\((\.\w+)\))?")
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
# wgmma and mma.sync: HGMMA.64x256x16.F32.BF16 of four warps, HMMA.16816.F32.BF16 of one
PRODUCT = re.compile(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)|[A-Z]MMA\.(16)(8)(\d+)")
BARRIER = re.compile(r"BAR\.")


@dataclass(frozen=True)
class Loop:
    """Hold what one step of the main loop executes, and what a program executes once for each tile around it."""

    instructions: int = 0  # of a warp; 0 for code without a loop
    flops: int = 0  # of the program's matrix instructions
    barriers: int = 0
    ends: int = 0  # instructions of a warp before and after the loop, on the shortest path


@dataclass(frozen=True)
class _Instruction:
    operation: str
    predicate: str | None
    target: str | None


def main_loop(code: str, warps: int) -> Loop:
    """Return the main loop of a kernel's disassembly by `nvdisasm -c`.

    It is the innermost loop with the most operations of matrix instructions, and of those with as many the shortest, as
    the loop over whole blocks beside one with masks. Without matrix instructions it is the longest innermost loop with
    a barrier, which sums over rows have, or without barriers the longest innermost loop.
    """
    instructions, labels = _parse(code)
    ranges = _innermost(instructions, labels)

    def importance(span: tuple[int, int]) -> tuple[int, int]:
        flops, length = _flops(instructions, span, warps), span[1] - span[0]
        return flops, -length if flops else length

    if not ranges:
        return Loop(ends=_shortest(instructions, labels, 0, None))
    begin, end = best = max(ranges, key=importance)
    body = instructions[begin:end]
    return Loop(
        len(body), _flops(instructions, best, warps), sum(bool(BARRIER.match(i.operation)) for i in body),
        _shortest(instructions, labels, 0, begin) + _shortest(instructions, labels, end, None),
    )  # fmt: skip


def _parse(code: str) -> tuple[list[_Instruction], dict[str, int]]:
    """Return the instructions, and the index of the instruction at each label."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := INSTRUCTION.search(line):
            target = match[4] if match[3].startswith("BRA") else None  # others name labels too, where branches meet
            instructions.append(_Instruction(match[3], match[2], target))
    return instructions, labels


def _innermost(instructions: list[_Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the ranges of innermost loops: of those with matrix instructions, else with barriers, else of all.

    A loop is the range between a backward branch and its target. Of ranges that overlap the shorter one is a loop: code
    out of line, which waits for a barrier, ends with a backward branch into the middle of a loop.
    """
    back = [(labels[i.target], at + 1) for at, i in enumerate(instructions) if i.target in labels]
    back = [(begin, end) for begin, end in back if begin < end]
    for pattern in (PRODUCT, BARRIER):
        places = [at for at, i in enumerate(instructions) if pattern.match(i.operation)]
        if kept := [(begin, end) for begin, end in back if any(begin <= at < end for at in places)]:
            back = kept
            break
    loops: list[tuple[int, int]] = []
    for begin, end in sorted(back, key=lambda span: span[1] - span[0]):
        if end - begin > 2 and all(end <= low or begin >= high for low, high in loops):
            loops.append((begin, end))
    return loops


def _flops(instructions: list[_Instruction], span: tuple[int, int], warps: int) -> int:
    """Return the operations of a range's matrix instructions in a program of this number of warps."""
    total = 0
    for instruction in instructions[slice(*span)]:
        if match := PRODUCT.match(instruction.operation):
            m, n, k = (int(side) for side in match.groups() if side)
            total += 2 * m * n * k * (warps // 4 if match[1] else warps)
    return total


def _shortest(instructions: list[_Instruction], labels: dict[str, int], begin: int, end: int | None) -> int:
    """Return the number of instructions on the shortest way from `begin` to `end`, or to the next EXIT for None."""
    starts = {0, begin, *labels.values(), *(at + 1 for at, i in enumerate(instructions) if i.target or _exits(i))}
    blocks = dict(pairwise([*sorted(at for at in starts if at < len(instructions)), len(instructions)]))
    seen, queue = set(), [(0, begin)]
    while queue:
        steps, at = heapq.heappop(queue)
        if at == end:
            return steps
        if at in seen or at not in blocks:
            continue
        seen.add(at)
        after, last = blocks[at], instructions[blocks[at] - 1]
        steps += after - at
        if end is None and _exits(last):
            return steps
        if last.target in labels:
            heapq.heappush(queue, (steps, labels[last.target]))
        if last.predicate or not (last.target or _exits(last)):
            heapq.heappush(queue, (steps, after))
    return 0


def _exits(instruction: _Instruction) -> bool:
    return instruction.operation == "EXIT"
