"""Draw charts of results with matplotlib (extra "report"), for the page of `mm1 bench report` and for docs/."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mm1.bench.comparison import fastest, gather, newest, verdict
from mm1.bench.page import Html, digits, percent, si, tag
from mm1.bench.record import Row
from mm1.bench.timing import CONTROL
from mm1.errors import UserError

WIDTH = 8.3  # inches
LANE = 0.3  # inches between bars
COLOURS = {"faster": "#12708e", "slower": "#b4490a", "even": "#707b84", "yard": "#c3c9ce"}
MARKERS = {"faster": "o", "slower": "v", "even": "s"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
Draw = Callable[[Any], None]


class Bar(NamedTuple):
    """Hold one line of a chart of bars, or a heading if it has no value."""

    name: str
    note: str  # text to the right of the chart
    value: float | None = None
    low: float = 0.0
    high: float = 0.0
    kind: str = "even"


def figure(height: float, draw: Draw) -> Any:
    """Return a matplotlib figure of `height` inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts need matplotlib: pip install matplotlib") from None
    chart = Figure((WIDTH, height), facecolor="white")
    axes = chart.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    draw(axes)
    return chart


def image(height: float, draw: Draw, description: str) -> Html:
    """Return a chart as an element that contains the picture."""
    chart, out = figure(height, draw), io.BytesIO()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # writes letters as text, which is smaller than their outlines
        chart.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
    return tag("div", tag("img", src=source, alt=description), class_="scroll", tabindex=0)


def pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write speedups.png and ladder.png, if there are rows for them, and return their paths.

    They show the machine that was measured last, or the GPU that was if there is one. Raises UserError without
    matplotlib, and as `gather` does.
    """
    results = gather(paths)
    machine = max(results, key=lambda result: (bool(result.header.get("gpu")), result.date)).machine
    results = [result for result in results if result.machine == machine]
    device = str(results[-1].header.get("device"))
    kernels = {op: rows for op, (_, rows) in newest(results, "kernels").items() if any(map(fastest, rows))}
    ladders = [row for _, rows in newest(results, "train").values() for row in rows if rungs(row)]
    charts = {"speedups.png": (LANE * len(kernels), partial(speedups, kernels, device))} if kernels else {}
    if ladders:
        charts["ladder.png"] = LANE * len(rungs(ladders[0])), partial(ladder, ladders[0], device)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (height, draw) in charts.items():
        figure(height + 0.9, draw).savefig(folder / name, dpi=200, bbox_inches="tight")
    return [folder / name for name in charts]


def speedups(compared: Mapping[str, Sequence[Row]], device: str, axes: Any) -> None:
    """Draw a line for each op with a mark for each case: the fastest peer's time over mm1's."""
    ratios = []
    for y, rows in enumerate(compared.values()):
        best = [(peer[1], verdict(peer[1], row.get("noise"))) for row in rows if (peer := fastest(row))]
        ratios += [ratio for ratio, _ in best]
        axes.plot([min(best)[0], max(best)[0]], [y, y], color="#dee2e5", linewidth=5, solid_capstyle="round", zorder=1)
        for ratio, kind in best:
            axes.plot(ratio, y, MARKERS[kind], color=COLOURS[kind], markersize=6, alpha=0.75, markeredgewidth=0)
        lost = sum(kind == "slower" for _, kind in best)
        _note(axes, y, f"slower in {lost} of {len(best)}", "slower" if lost else "even")
    _lanes(axes, list(compared))
    _ratios(axes, ratios)
    axes.set_xlabel(f"fastest peer's time over mm1's, a mark a case; {device}", fontsize=9)


def bars(lines: Sequence[Bar], axes: Any) -> None:
    """Draw ratios as bars that begin at 1, with whiskers, below the headings of their cases."""
    values = [value for line in lines if line.value for value in (line.low, line.value, line.high)]
    for y, line in enumerate(lines):
        if line.value:
            axes.barh(y, line.value - 1, 0.55, left=1, color=COLOURS[line.kind])
            axes.plot([line.low, line.high], [y, y], color="#1d2329", linewidth=1)
        _note(axes, y, line.note, line.kind)
    _lanes(axes, [line.name if line.value else "" for line in lines])
    for y, line in enumerate(lines):
        if not line.value:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            place = axes.get_yaxis_transform()
            axes.text(0, y, _plain(line.name), transform=place, va="center", fontsize=9, weight="bold", bbox=box)
    _ratios(axes, values)
    axes.set_xlabel("time over mm1's", fontsize=9)


def rungs(row: Row) -> dict[str, dict[str, Any]]:
    """Return the ways to train a model that have a rate."""
    return {name: way for name, way in row["variants"].items() if way.get("tokens_per_s") and name != CONTROL}


def ladder(row: Row, device: str, axes: Any) -> None:
    """Draw the tokens per second of each way to train a model, with whiskers."""
    ways = rungs(row)
    for y, way in enumerate(ways.values()):
        rate = way["tokens_per_s"]
        axes.barh(y, rate, 0.6, color=COLOURS["faster" if way.get("change") else "even"])
        axes.plot([rate * way["median"] / way[end] for end in ("high", "low")], [y, y], color="#1d2329", linewidth=1)
        _note(axes, y, digits(rate) + (f", MFU {percent(way['mfu'])}" if way.get("mfu") else ""), "even")
    _lanes(axes, list(ways))
    axes.set_xlabel(f"tokens/s, {row.get('model')}; grey: other ways; {device}", fontsize=9)


def roofline(points: Mapping[str, Sequence[tuple[float, float]]], copy: float, gemm: Mapping[str, float],
             axes: Any) -> None:  # fmt: skip
    """Draw FLOP/s of each op against FLOP per byte, below the limits by memory (`copy`, B/s) and products (`gemm`)."""
    for number, (op, at) in enumerate(points.items()):
        axes.loglog(*zip(*at), "osv^D*"[number // 10 % 6], color=f"C{number % 10}", label=op, alpha=0.8)
    low = min(x for at in points.values() for x, _ in at) / 1.6
    high = max([*(x for at in points.values() for x, _ in at), *(rate / copy for rate in gemm.values())]) * 1.6
    top = max(gemm.values(), default=high * copy)
    axes.plot([low, top / copy], [low * copy, top], color="#1d2329", linewidth=1.5, zorder=0)
    axes.text(low, low * copy, f"memory {si(copy, 'B/s')} ", fontsize=9, va="bottom")
    for dtype, rate in gemm.items():
        axes.plot([rate / copy, high], [rate, rate], color="#1d2329", linewidth=1.5, zorder=0)
        axes.text(high, rate, f"{dtype} products {si(rate, 'FLOP/s')}", fontsize=9, ha="right", va="bottom")
    axes.set_xlabel("FLOP a byte", fontsize=9)
    axes.set_ylabel("FLOP/s", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def lines(series: Mapping[str, Sequence[tuple[float, float, float, float]]], axes: Any, *, x: str, y: str,
          ticks: Mapping[int, str] | None = None, kinds: Sequence[str] = (), log: bool = True) -> None:  # fmt: skip
    """Draw a line through points (x, value, low, high) for each name. kinds: verdicts that colour the lines."""
    for number, (name, points) in enumerate(series.items()):
        at, values, lows, highs = zip(*points)
        spread = [[v - low for v, low in zip(values, lows)], [high - v for v, high in zip(values, highs)]]
        colour = COLOURS[kinds[number]] if kinds else f"C{number}"
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.errorbar(
            at, values, spread, label=_plain(name), color=colour, marker="o", markersize=4, linewidth=1.2, ls=style
        )
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    if not kinds:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _plain(text: str) -> str:
    """Escape a text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def _note(axes: Any, y: float, text: str, kind: str) -> None:
    colour = COLOURS["even" if kind == "yard" else kind]
    axes.text(1.02, y, _plain(text), transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=colour)


def _lanes(axes: Any, names: Sequence[str]) -> None:
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _ratios(axes: Any, ratios: Sequence[float]) -> None:
    low, high = min([0.7, *ratios]) / 1.1, max([1.4, *ratios]) * 1.1
    axes.axvline(1, color="#1d2329", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
