"""Result files as one HTML page that needs no network.

Of each op and model, the newest file of a machine that has rows of it is shown; all of them make the history.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mm1.bench.chart import (  # isort: skip
    PALETTE, Html, Scale, Text, anchor, axis, bar, digits, document, fold, joined, lane, legend, line, percent, plot,
    polyline, short, si, stack, table, tag,
)  # fmt: skip
from mm1.bench.comparison import DENSE, Result, fastest, gather, label, newest, subject, verdict
from mm1.bench.record import Row, key
from mm1.bench.timing import CONTROL

SHOWN = 6  # cases of an op that are not folded, and all where a peer is faster
SIZES = {"tokens": "T", "experts": "E", "images": "N", "batch": "batch"}  # as a row's shape and its case name them
MARKS = {"faster": "▲", "slower": "▼", "even": "≈"}
INTRO = """Ratios are another way's time over mm1's, taken round by round: above 1 mm1 is faster, below 1 it is slower.
Times are medians of interleaved rounds; whiskers and spreads hold the middle four fifths of them. Noise is by how much
two runs of mm1 within the same rounds differ: a ratio that is no further from 1 says nothing."""


def report(paths: Sequence[Path], out: Path) -> None:
    """Writes the page of these result files and of all in these folders; of none, of those of this package.

    Raises UserError, in one line, if a file is no record or there is no row at all.
    """
    machines: dict[str, list[Result]] = {}
    for result in gather(paths):
        machines.setdefault(result.machine, []).append(result)
    page = document("mm1 benchmarks", INTRO, {name: _machine(name, results) for name, results in machines.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def _machine(name: str, results: list[Result]) -> Html:
    kernels, trained, generated = (newest(results, bench) for bench in ("kernels", "train", "generate"))
    compared = {op: rows for op, (_, rows) in kernels.items()}
    compared |= {f"generation, {model}": rows for model, (_, rows) in generated.items()}
    return joined([
        _about(results), _overview(name, compared), *(_compared(name, title, rows) for title, rows in compared.items()),
        _roofline(kernels), *(_ladder(row) for _, rows in trained.values() for row in rows),
        _scaling([row for rows in compared.values() for row in rows]), _history(results),
    ])  # fmt: skip


def _about(results: list[Result]) -> Html:
    header, rows = results[-1].header, [row for result in results for row in result.rows]
    versions, ceilings = header.get("versions") or {}, header.get("ceilings") or {}
    noise = sorted(row["noise"] for row in rows if row.get("noise") is not None)
    hot = sum(bool((row.get("gpu") or {}).get("throttled")) for row in rows)
    rates = [f"memory {si(ceilings['copy'], 'B/s')}"] if ceilings.get("copy") else []
    rates += [f"{dtype} products {si(rate, 'FLOP/s')}" for dtype, rate in (ceilings.get("gemm") or {}).items()]
    facts = {
        "Device": header.get("device"),
        "Records": joined(tag("div", f"{r.date}, commit {r.commit}, {len(r.rows)} rows") for r in results),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Not there": ", ".join(name for name, version in versions.items() if not version),
        "Ceilings": ", ".join(rates),
        "Noise": noise and f"{percent(noise[len(noise) // 2])} (median row), {percent(noise[-1])} (noisiest)",
        "Throttled": f"{hot} of {len(rows)} rows" if any(row.get("gpu") for row in rows) else "",
    }
    return tag("dl", *(tag("dt", name) + tag("dd", fact) for name, fact in facts.items() if fact))


def _overview(machine: str, compared: dict[str, list[Row]]) -> Html:
    best = {title: [(row, *found) for row in rows if (found := fastest(row))] for title, rows in compared.items()}
    ratios = [ratio for found in best.values() for _, _, ratio in found]
    if not ratios:
        return Html("")
    scale = Scale.of([0.7, 1.4, *ratios])
    lanes, slower = [], []
    for title, found in best.items():
        kinds = [verdict(ratio, row.get("noise")) for row, _, ratio in found]
        dots = [tag("circle", cx=f"{scale.at(ratio)}%", cy=11, r=4.5, fill_opacity=0.7, class_=kind)
                for (_, _, ratio), kind in zip(found, kinds)]  # fmt: skip
        lost = [[title, label(row), name, (_says(ratio, kind), kind)]
                for (row, name, ratio), kind in zip(found, kinds) if kind == "slower"]  # fmt: skip
        none = tag("span", f"slower in none of {len(found)}", class_="soft")
        words = f"▼ slower in {len(lost)} of {len(found)}" if lost else none
        link = tag("a", title, href=f"#{anchor(machine, title)}")
        lanes.append(lane(link, dots, words, scale, 1, "slower" if lost else None))
        slower += lost
    return joined([
        tag("h3", "Against the fastest peer"),
        tag("p", "A dot is a case: the fastest peer's time over mm1's.", class_="soft"), *lanes, axis(scale, _times),
        table(["", "case", "fastest peer", "ratio"], slower, f"Slower than a peer: {len(slower)} of {len(ratios)}"),
    ])  # fmt: skip


def _compared(machine: str, title: str, rows: list[Row]) -> Html:
    """Bars of each row's ratios, what failed, and the numbers."""
    ratios = [found["ratio"] for row in rows for found in row["variants"].values() if "ratio" in found]
    scale = Scale.of([0.7, 1.4, *(ratio[end] for ratio in ratios for end in ("low", "high"))])
    factor, unit = _unit(rows)
    dtypes = {row["dtype"] for row in rows if row.get("dtype")}
    heading = f"{title} · {', '.join(sorted(dtypes))}"
    charts, folded, numbers, failed = [], [], [], {}
    for row in rows:
        name = label(row, *("case", "what", "dtype")[: 2 + (len(dtypes) > 1)])
        lanes = []
        for way, found in row["variants"].items():
            if way == CONTROL:
                continue
            ratio, noise = found.get("ratio"), row.get("noise")
            numbers.append([
                name, way, digits(found["median"] * factor), _range(found, factor),
                percent(found.get("share")), digits(found.get("tokens_per_s")), percent(found.get("bandwidth_share")),
                digits(ratio and ratio["median"]), _range(ratio), percent(noise) if way == "mm1" else "",
                digits(found.get("host") and found["host"] * 1e6), digits(found.get("joules")),
                digits(found.get("error") and found["error"] * 1e6),
            ])  # fmt: skip
            if ratio:
                kind = "yard" if way == DENSE else verdict(ratio["median"], noise)
                marks = bar(scale, 1, ratio["median"], ratio["low"], ratio["high"], kind)
                who = f"{way} (yardstick)" if way == DENSE else way
                lanes.append(lane(who, marks, _says(ratio["median"], kind), scale, 1, kind))
        for way, why in (row.get("failed") or {}).items():
            failed.setdefault(f"{way}: {why}", []).append(name)
        if lanes and (ours := row["variants"].get("mm1")):
            share = f", {percent(ours['share'])} of the roofline" if ours.get("share") else ""
            head = tag("h4", name), tag("span", f"mm1 {si(ours['median'], 's')}{share}", class_="soft")
            chart = tag("figure", tag("figcaption", *head), *lanes, axis(scale, _times))
            best = fastest(row)
            lost = best is not None and verdict(best[1], row.get("noise")) == "slower"
            (charts if len(charts) < SHOWN or lost else folded).append(chart)
    head = ["case", "way", unit, "spread", "of the roofline", "tokens/s", "of the bandwidth", "ratio", "its spread",
            "noise", "launch, µs", "joules", "error, ppm"]  # fmt: skip
    kept = [i for i in range(len(head)) if any(row[i] for row in numbers)]
    return joined([
        tag("h3", heading, id=anchor(machine, title)),
        tag("div", *charts, class_="grid"), _failures(failed, len(rows)),
        fold(f"{len(folded)} more", tag("div", *folded, class_="grid")) if folded else "",
        table([head[i] for i in kept], [[row[i] for i in kept] for row in numbers]),
    ])  # fmt: skip


def _failures(failed: dict[str, list[str]], rows: int) -> Html:
    """By reason, of which rows."""
    lost = [f"{why} ({'; '.join(where)})" if len(where) < rows else why for why, where in failed.items()]
    return tag("div", "Failed:", tag("ul", *(tag("li", words) for words in lost)), class_="soft") if lost else Html("")


def _roofline(kernels: dict[str, tuple[Result, list[Row]]]) -> Html:
    found = [(op, row, row["flops"] / row["bytes"], row["flops"] / row["variants"]["mm1"]["median"])
             for op, (_, rows) in kernels.items() for row in rows
             if row.get("flops") and row.get("bytes") and "mm1" in row["variants"]]  # fmt: skip
    ceilings = next((limits for result, _ in kernels.values() if (limits := result.header.get("ceilings"))), None)
    if not found or not ceilings:
        return Html("")
    copy, dtypes = ceilings["copy"], {row.get("dtype") for _, row, _, _ in found}
    gemm = {dtype: rate for dtype, rate in ceilings["gemm"].items() if dtype in dtypes}
    x = Scale.of([*(i for _, _, i, _ in found), *(rate / copy for rate in gemm.values())], 1.6)
    y = Scale.of([*(rate for *_, rate in found), *gemm.values()], 1.6)
    up = lambda v: f"{100 - y.at(v):.2f}%"  # noqa: E731
    foot, roof = max(x.low, y.low / copy), min(max(gemm.values(), default=y.high), x.high * copy)
    middle = math.sqrt(foot * roof / copy)
    marks = [line(x.at(foot), up(foot * copy), x.at(roof / copy), up(roof), "top"),
             tag("text", f"memory {si(copy, 'B/s')}", x=f"{x.at(middle)}%", y=up(middle * copy), dx=-8, dy=-4,
                 text_anchor="end")]  # fmt: skip
    for dtype, rate in gemm.items():
        words = f"{dtype} products {si(rate, 'FLOP/s')}"
        marks += [line(x.at(rate / copy), up(rate), 100, up(rate), "top"),
                  tag("text", words, x="100%", y=up(rate), dy=-8, text_anchor="end")]  # fmt: skip
    letters = {op: chr(ord("A") + i) for i, op in enumerate(kernels)}
    for op, row, intensity, rate in found:
        at, kind = (f"{x.at(intensity)}%", up(rate)), f"point c{list(letters).index(op) % PALETTE}"
        letter = tag("text", letters[op], x=at[0], y=at[1], dy=4, text_anchor="middle")
        named = tag("title", f"{op} · {label(row)}")
        marks.append(tag("g", named, tag("circle", cx=at[0], cy=at[1], r=8), letter, class_=kind))
    words = """Operations a second of mm1 against operations a byte, and above them what this machine did in the same
    run: large products, and reading and writing memory."""
    numbers = [[op, label(row), digits(i), si(rate, "FLOP/s")] for op, row, i, rate in found]
    return joined([
        tag("h3", "Roofline"), tag("p", words, class_="soft"),
        plot(marks, x, y, ("FLOP a byte", "FLOP/s"), (short, lambda v: si(v, "", short)), 340),
        tag("div", *(tag("span", tag("b", letter), op, class_="key") for op, letter in letters.items())),
        table(["", "case", "FLOP a byte", "FLOP/s"], numbers),
    ])  # fmt: skip


def _ladder(row: Row) -> Html:
    ways = {name: found for name, found in row["variants"].items() if found.get("tokens_per_s") and name != CONTROL}
    if not ways:
        return Html("")
    scale = Scale(0, max(found["tokens_per_s"] for found in ways.values()) * 1.05, log=False)
    lanes, numbers = [], []
    for name, found in ways.items():
        rate, change, memory = found["tokens_per_s"], found.get("change"), found.get("peak_bytes")
        ends = [rate * found["median"] / found[end] for end in ("high", "low")]
        mfu = f" · MFU {percent(found['mfu'])}" if found.get("mfu") else ""
        marks = bar(scale, 0, rate, ends[0], ends[1], "faster" if change else "even")
        who = joined([name, tag("small", change or found.get("about", "another way"))])
        lanes.append(lane(who, marks, f"{digits(rate)} tokens/s{mfu}", scale, 0))
        numbers.append([
            name, digits(rate), digits(found.get("images_per_s")), digits(found["median"] * 1e3), _range(found, 1e3),
            digits(found["ratio"]["median"]) if found.get("ratio") else "", percent(found.get("mfu")),
            percent(found.get("hfu")), percent(found.get("padding")), percent(found.get("data_wait")),
            digits(found.get("compile_seconds")), found.get("recompiles", ""), si(memory, "B") if memory else "",
        ])  # fmt: skip
    head = ["", "tokens/s", "images/s", "ms a step", "spread", "time over the first's", "MFU", "HFU", "padding",
            "waits for data", "compiling, s", "recompiles", "memory"]  # fmt: skip
    words = "Each line adds one change to the one above; grey are other ways to train the same model."
    return joined([
        tag("h3", f"Training {subject(row)}: {label(row, 'case', 'dtype')}"), tag("p", words, class_="soft"),
        tag("div", *lanes, axis(scale, lambda v: si(v, "", short)), class_="wide"),
        _failures({f"{name}: {why}": [""] for name, why in (row.get("failed") or {}).items()}, 1),
        table(head, numbers), _ledger(row.get("ledger") or {}),
    ])  # fmt: skip


def _ledger(ledger: dict[str, int]) -> Html:
    totals = {name: ledger.get(name, 0) for name in ("useful", "padding", "recompute")}
    if not (whole := sum(totals.values())):
        return Html("")
    return joined([
        tag("h4", "Operations of a step"), stack({name: n / whole for name, n in totals.items()}),
        table(["part", "FLOP"], [[part, si(n, "FLOP")] for part, n in ledger.items()]),
    ])  # fmt: skip


def _scaling(rows: list[Row]) -> Html:
    """Of rows whose cases differ in one size alone, where there are three or more."""
    families: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        for size, letter in SIZES.items():
            n = int((row.get("shape") or {}).get(size, 0))
            case, count = re.subn(rf"\b(?:({letter}=){n}|{n}( {size}))(?!\w)", r"\1…\2", str(row.get("case")))
            if count:
                families.setdefault((size, *key({**row, "case": case})), {})[n] = {**row, "case": case, "gpu": None}
    charts = []
    for (size, *_), members in families.items():
        if len(members) > 2:
            members = dict(sorted(members.items()))
            charts.append(_against(size, members, "median", "time", lambda v: si(v, "s", short)))
            if members[max(members)].get("what") == "decode":
                charts.append(
                    _against(size, members, "bandwidth_share", "of the bandwidth", lambda v: percent(v, short))
                )
    return tag("h3", "With size") + tag("div", *charts, class_="grid small") if charts else Html("")


def _against(size: str, members: dict[int, Row], field: str, name: str, text: Text) -> Html:
    row = members[max(members)]
    ways = [way for way, found in row["variants"].items() if way != CONTROL and found.get(field)]
    ways = sorted(ways, key=lambda way: (way != "mm1", row["variants"][way]["median"]))[:PALETTE]
    ends = ("median", "low", "high") if field == "median" else (field,) * 3
    points = [[(n, *(found[end] for end in ends)) for n, row in members.items() if (found := row["variants"].get(way))]
              for way in ways]  # fmt: skip
    x, y = Scale.of(members), Scale.of(value for of_way in points for point in of_way for value in point[1:])
    marks = [polyline(of_way, x, y, f"c{i}") for i, of_way in reversed([*enumerate(points)])]
    chart = plot(marks, x, y, (size, name), (short, text), 190, list(members))
    return tag("figure", tag("h4", f"{subject(row)}: {label(row)}"), chart, legend(ways))


def _history(results: list[Result]) -> Html:
    """Of each op and model, rows that several files have: times over the first one's."""
    found: dict[str, dict[tuple[Any, ...], dict[int, tuple[Row, dict[str, Any]]]]] = {}
    for i, result in enumerate(results):
        for row in result.rows:
            if ours := _ours(row):
                found.setdefault(subject(row), {}).setdefault(key(row), {})[i] = row, ours
    charts, numbers = [], []
    for name, rows in found.items():
        lines, changes = [], {"faster": [], "slower": []}
        for runs in rows.values():
            if len(runs) < 2:
                continue
            factor, unit = _unit([row for row, _ in runs.values()])
            title, kinds = label(runs[max(runs)][0]), {}
            for before, now in pairwise([-1, *runs]):
                _, ours = runs[now]
                kinds[now], words = _change(runs[before], runs[now]) if before in runs else ("even", "")
                result, time = results[now], f"{digits(ours['median'] * factor)} {unit}"
                place = name, title, result.date, result.commit
                numbers.append([*place, time, _range(ours, factor), (words, kinds[now])])
                if kinds[now] != "even":
                    changes[kinds[now]].append(f"{title}: {words} at {results[now].commit}")
            lines.append((runs, kinds))
        if lines:
            charts.append(_trend(name, results, lines, changes))
    if not charts:
        return Html("")
    words = """Times over the first commit's, a line a row. Marked is what changed by more than the noise of either run,
    their spreads apart."""
    return joined([
        tag("h3", "Over commits"), tag("p", words, class_="soft"), tag("div", *charts, class_="grid small"),
        table(["", "case", "date", "commit", "median", "spread", "change"], numbers),
    ])  # fmt: skip


def _trend(name: str, results: list[Result], lines: list[Any], changes: dict[str, list[str]]) -> Html:
    """lines: of each row its runs by number of the result, and each run's verdict."""
    points = []
    for runs, _ in lines:
        first = runs[min(runs)][1]["median"]
        points.append([(i, *(ours[end] / first for end in ("median", "low", "high"))) for i, (_, ours) in runs.items()])
    numbers = sorted({i for runs, _ in lines for i in runs})
    x = Scale(numbers[0] - 0.3, numbers[-1] + 0.3, log=False)
    y = Scale.of((v for of_row in points for point in of_row for v in point[1:]), 1.05)
    kinds = [next((kind for kind in ("slower", "faster") if kind in found.values()), "even") for _, found in lines]
    marks = [polyline(of_row, x, y, kind) for of_row, kind in zip(points, kinds)]
    commit = lambda i: results[int(i)].commit[:7]  # noqa: E731
    chart = plot(marks, x, y, ("commit", "time, relative"), (commit, _times), 150, [numbers[0], numbers[-1]])
    counts = [
        tag("span", f"{MARKS[kind]} {len(found)} {kind} ", class_=f"says {kind}")
        for kind, found in changes.items()
        if found
    ]
    slower = tag("ul", *(tag("li", words) for words in changes["slower"]), class_="soft") if changes["slower"] else ""
    head = tag("h4", name), tag("span", *(counts or ["no change beyond the noise"]), class_="soft")
    return tag("figure", tag("figcaption", *head), chart, slower)


def _change(before: tuple[Row, dict[str, Any]], now: tuple[Row, dict[str, Any]]) -> tuple[str, str]:
    """verdict, words. Even: less than either run's noise, or their spreads meet."""
    (earlier, theirs), (row, ours) = before, now
    apart = theirs["low"] > ours["high"] or theirs["high"] < ours["low"]
    noise = max(earlier.get("noise") or 0, row.get("noise") or 0)
    kind = verdict(theirs["median"] / ours["median"], noise) if apart else "even"
    share = f"{100 * (ours['median'] / theirs['median'] - 1):+.1f} % time".replace("-", "−")
    return kind, f"{MARKS[kind]} {share}, {'within noise' if kind == 'even' else kind}"


def _ours(row: Row) -> dict[str, Any] | None:
    """mm1, or the ladder's fastest rung."""
    rungs = [found for found in row["variants"].values() if found.get("change")]
    return row["variants"].get("mm1") or min(rungs, key=lambda found: found["median"], default=None)


def _says(ratio: float, kind: str) -> str:
    times = f"{digits(ratio)}×"
    words = {"faster": f"{times} faster", "slower": f"slower: {times}", "even": f"{times}, within noise"}.get(kind)
    return f"{MARKS[kind]} {words}" if words else times


def _unit(rows: list[Row]) -> tuple[float, str]:
    """One for a table."""
    least = min((found["median"] for row in rows for found in row["variants"].values()), default=1)
    return (1e6, "µs") if least < 1e-3 else (1e3, "ms")


def _range(found: dict[str, Any] | None, factor: float = 1) -> str:
    return f"{digits(found['low'] * factor)} … {digits(found['high'] * factor)}" if found else ""


def _times(ratio: float) -> str:
    return f"{short(ratio)}×"
