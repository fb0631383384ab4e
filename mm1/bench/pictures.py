"""Two pictures of results for the README, with matplotlib of the extra "report"."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm1.bench.chart import digits
from mm1.bench.comparison import fastest, gather, newest, verdict
from mm1.bench.record import Row
from mm1.bench.timing import CONTROL
from mm1.errors import UserError

WIDTH = 8.3  # inches; shown at 100 dots each, drawn at twice as many
COLOURS = {"faster": "#12708e", "slower": "#b4490a", "even": "#707b84"}


def pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Writes speedups.png and ladder.png, of the machine measured last, a GPU if there is one; each if it has rows.

    Raises UserError without matplotlib, and as `gather` does.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'mm1-engine[report]'") from None
    results = gather(paths)
    machine = max(results, key=lambda result: (bool(result.header.get("gpu")), result.date)).machine
    results = [result for result in results if result.machine == machine]
    device = str(results[-1].header.get("device"))
    kernels = {op: rows for op, (_, rows) in newest(results, "kernels").items() if any(map(fastest, rows))}
    ladder = next((row for _, rows in newest(results, "train").values() for row in rows if row["variants"]), None)

    def picture(name: str, lanes: int, draw: Callable[[Any], None]) -> Path:
        figure = Figure((WIDTH, 0.34 * lanes + 0.9), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        draw(axes)
        figure.savefig(folder / name, dpi=200)
        return folder / name

    folder.mkdir(parents=True, exist_ok=True)
    written = [picture("speedups.png", len(kernels), partial(_speedups, kernels, device))] if kernels else []
    if ladder:
        written.append(picture("ladder.png", len(ladder["variants"]), partial(_ladder, ladder, device)))
    return written


def _speedups(kernels: dict[str, list[Row]], device: str, axes: Any) -> None:
    ratios = []
    for y, rows in enumerate(kernels.values()):
        found = [(best[1], verdict(best[1], row.get("noise"))) for row in rows if (best := fastest(row))]
        ratios += [ratio for ratio, _ in found]
        axes.plot(
            [min(found)[0], max(found)[0]], [y, y], color="#dee2e5", linewidth=5, solid_capstyle="round", zorder=1
        )
        for ratio, kind in found:
            marker = {"faster": "o", "slower": "v", "even": "s"}[kind]
            axes.plot(ratio, y, marker, color=COLOURS[kind], markersize=6, alpha=0.75, markeredgewidth=0)
        lost = sum(kind == "slower" for _, kind in found)
        axes.text(1.02, y, f"slower in {lost} of {len(found)}", transform=axes.get_yaxis_transform(), va="center",
                  fontsize=9, color=COLOURS["slower"] if lost else COLOURS["even"])  # fmt: skip
    axes.axvline(1, color="#1d2329", linewidth=1, zorder=0)
    axes.set_xscale("log")
    ticks = [
        t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if min(ratios) * 0.8 < t < max(ratios) * 1.25
    ]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(kernels)), kernels)
    axes.set_xlabel(f"fastest peer's time over mm1's, a mark a case; {device}", fontsize=9)


def _ladder(row: Row, device: str, axes: Any) -> None:
    ways = {name: found for name, found in row["variants"].items() if found.get("tokens_per_s") and name != CONTROL}
    for y, found in enumerate(ways.values()):
        rate = found["tokens_per_s"]
        axes.barh(y, rate, 0.6, color=COLOURS["faster" if found.get("change") else "even"])
        mfu = f", MFU {digits(100 * found['mfu'])} %" if found.get("mfu") else ""
        axes.text(rate, y, f"  {digits(rate)}{mfu}", va="center", fontsize=9)
    axes.set_xlim(0, max(found["tokens_per_s"] for found in ways.values()) * 1.25)
    axes.set_yticks(range(len(ways)), ways)
    axes.set_xlabel(f"tokens/s, {row.get('model')}; grey: other ways; {device}", fontsize=9)
