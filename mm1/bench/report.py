"""Make one HTML page of result files. It needs no network.

For each machine, op and model the page shows the newest file that has rows of it. The history shows all files.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from mm1.bench.comparison import DENSE, Result, fastest, gather, label, newest, subject, verdict
from mm1.bench.page import Html, anchor, digits, document, fold, joined, percent, si, table, tag
from mm1.bench.pictures import LANE, Bar, bars, image, ladder, lines, roofline, rungs, speedups
from mm1.bench.record import Row, key
from mm1.bench.timing import CONTROL

SHOWN = 6  # cases of an op that are not folded; cases in which a peer is faster are never folded
SIZES = {"tokens": "T", "experts": "E", "images": "N", "batch": "batch"}  # names in a row's shape, and in its case
MARKS = {"faster": "▲", "slower": "▼", "even": "≈"}
INTRO = """Ratios are another implementation's time over mm1's, compared round by round: above 1 mm1 is faster, below 1
mm1 is slower. Times are medians of interleaved rounds; whiskers and spreads contain the middle 80 % of them. Noise is
the difference between two runs of mm1 in the same rounds: a ratio that is not further from 1 means nothing."""

Run = tuple[Row, dict[str, Any]]  # a row and the times of mm1 in it


def report(paths: Sequence[Path], out: Path) -> None:
    """Write the page for these result files and for all files in these folders.

    Raises UserError, in one line, if a file is not a record, if there are no rows at all, or without matplotlib.
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
        _roofline(kernels), *(_training(name, row) for _, rows in trained.values() for row in rows),
        _scaling([row for rows in compared.values() for row in rows]), _history(results),
    ])  # fmt: skip


def _about(results: list[Result]) -> Html:
    """Return a machine's device, records, versions, ceilings, noise and throttling."""
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
        "Missing": ", ".join(name for name, version in versions.items() if not version),
        "Ceilings": ", ".join(rates),
        "Noise": noise and f"{percent(noise[len(noise) // 2])} (median row), {percent(noise[-1])} (noisiest)",
        "Throttled": f"{hot} of {len(rows)} rows" if any(row.get("gpu") for row in rows) else "",
    }
    return tag("dl", *(part for name, fact in facts.items() if fact for part in (tag("dt", name), tag("dd", fact))))


def _overview(machine: str, compared: dict[str, list[Row]]) -> Html:
    """Return the chart of all ratios to the fastest peers, and the list of rows in which mm1 is slower."""
    compared = {title: rows for title, rows in compared.items() if any(map(fastest, rows))}
    if not compared:
        return Html("")
    links, slower, total = [], [], 0
    for title, rows in compared.items():
        best = [(row, *peer, verdict(peer[1], row.get("noise"))) for row in rows if (peer := fastest(row))]
        lost = [[title, label(row), name, (_comparison(ratio, kind), kind)] for row, name, ratio, kind in best
                if kind == "slower"]  # fmt: skip
        words = f"▼ slower in {len(lost)} of {len(best)}" if lost else f"slower in none of {len(best)}"
        link = tag("a", title, href=f"#{anchor(machine, title)}")
        links.append(tag("li", link, ": ", tag("span", words, class_="slower" if lost else "even")))
        slower, total = slower + lost, total + len(best)
    chart = image(LANE * len(compared) + 0.8, partial(speedups, compared, machine), "ratios to the fastest peers")
    head = ["", "case", "fastest peer", "ratio"]
    return joined([tag("h3", "Against the fastest peer"), chart, tag("ul", *links),
                   table(head, slower, f"Slower than a peer: {len(slower)} of {total}")])  # fmt: skip


def _compared(machine: str, title: str, rows: list[Row]) -> Html:
    """Return the bars of each row's ratios, the failures, and the table of numbers."""
    factor, unit = _unit(rows)
    dtypes = {row["dtype"] for row in rows if row.get("dtype")}
    shown: list[Bar] = []
    folded: list[Bar] = []
    numbers: list[list[Any]] = []
    failed: dict[str, list[str]] = {}
    cases = 0
    for row in rows:
        name = label(row, *("case", "what", "dtype")[: 2 + (len(dtypes) > 1)])
        chart = []
        for way, times in row["variants"].items():
            if way == CONTROL:
                continue
            ratio, noise = times.get("ratio"), row.get("noise")
            kind = "yard" if way == DENSE else verdict(ratio["median"], noise) if ratio else ""
            text = _comparison(ratio["median"], kind) if ratio else ""
            numbers.append([
                name, way, (text, kind), digits(times["median"] * factor), _range(times, factor),
                percent(times.get("share")), digits(times.get("tokens_per_s")), percent(times.get("bandwidth_share")),
                digits(ratio and ratio["median"]), _range(ratio), percent(noise) if way == "mm1" else "",
                digits(times.get("host") and times["host"] * 1e6), digits(times.get("joules")),
                digits(times.get("error") and times["error"] * 1e6),
            ])  # fmt: skip
            if ratio:
                who = f"{way} (yardstick)" if way == DENSE else way
                chart.append(Bar(who, text, ratio["median"], ratio["low"], ratio["high"], kind))
        for way, why in (row.get("failed") or {}).items():
            failed.setdefault(f"{way}: {why}", []).append(name)
        if chart and (ours := row["variants"].get("mm1")):
            share = f", {percent(ours['share'])} of the roofline" if ours.get("share") else ""
            chart.insert(0, Bar(name, f"mm1 {si(ours['median'], 's')}{share}"))
            best = fastest(row)
            lost = best is not None and verdict(best[1], row.get("noise")) == "slower"
            (shown if cases < SHOWN or lost else folded).extend(chart)
            cases += 1
    head = ["case", "way", "mm1 is", unit, "spread", "of the roofline", "tokens/s", "of the bandwidth", "ratio",
            "its spread", "noise", "launch, µs", "joules", "error, ppm"]  # fmt: skip
    columns = [i for i in range(len(head)) if any(row[i] and row[i] != ("", "") for row in numbers)]
    more = f"{sum(bar.value is None for bar in folded)} more"
    return joined([
        tag("h3", f"{title} · {', '.join(sorted(dtypes))}", id=anchor(machine, title)),
        _bars(shown, title), _failures(failed, len(rows)), fold(more, _bars(folded, title)) if folded else "",
        table([head[i] for i in columns], [[row[i] for i in columns] for row in numbers]),
    ])  # fmt: skip


def _bars(chart: list[Bar], title: str) -> Html:
    return image(LANE * len(chart) + 0.8, partial(bars, chart), f"{title}: ratios by case") if chart else Html("")


def _failures(failed: dict[str, list[str]], rows: int) -> Html:
    """Return the reasons of failures, each with its rows unless all rows have it."""
    lost = [f"{why} ({'; '.join(where)})" if len(where) < rows else why for why, where in failed.items()]
    return tag("div", "Failed:", tag("ul", *(tag("li", words) for words in lost)), class_="soft") if lost else Html("")


def _roofline(kernels: dict[str, tuple[Result, list[Row]]]) -> Html:
    """Return the chart of operations per second against operations per byte, and its numbers."""
    points = [(op, row, row["flops"] / row["bytes"], row["flops"] / row["variants"]["mm1"]["median"])
              for op, (_, rows) in kernels.items() for row in rows
              if row.get("flops") and row.get("bytes") and "mm1" in row["variants"]]  # fmt: skip
    ceilings = next((limits for result, _ in kernels.values() if (limits := result.header.get("ceilings"))), None)
    if not points or not ceilings:
        return Html("")
    dtypes = {str(row.get("dtype")) for _, row, _, _ in points}
    gemm: dict[str, float] = {dtype: rate for dtype, rate in ceilings["gemm"].items() if dtype in dtypes}
    by_op = {op: [(x, y) for name, _, x, y in points if name == op] for op, *_ in points}
    rates = [f"memory {si(ceilings['copy'], 'B/s')}", *(f"{d} products {si(r, 'FLOP/s')}" for d, r in gemm.items())]
    words = f"""Operations per second of mm1 against operations per byte, below this machine's ceilings, which were
        measured in the same run: {", ".join(rates)}."""
    numbers = [[op, label(row), digits(x), si(y, "FLOP/s")] for op, row, x, y in points]
    return joined([
        tag("h3", "Roofline"), tag("p", words, class_="soft"),
        image(4, partial(roofline, by_op, ceilings["copy"], gemm), "operations per second against operations per byte"),
        table(["", "case", "FLOP a byte", "FLOP/s"], numbers),
    ])  # fmt: skip


def _training(machine: str, row: Row) -> Html:
    """Return the ladder of a trained model, its numbers, and its operations."""
    ways = rungs(row)
    if not ways:
        return Html("")
    numbers = [[
        name, way.get("change") or way.get("about", "another way"), digits(way["tokens_per_s"]),
        digits(way.get("images_per_s")), digits(way["median"] * 1e3), _range(way, 1e3),
        digits(way["ratio"]["median"]) if way.get("ratio") else "", percent(way.get("mfu")),
        percent(way.get("hfu")), percent(way.get("padding")), percent(way.get("data_wait")),
        digits(way.get("compile_seconds")), way.get("recompiles", ""),
        si(way["peak_bytes"], "B") if way.get("peak_bytes") else "",
    ] for name, way in ways.items()]  # fmt: skip
    head = ["", "adds", "tokens/s", "images/s", "ms a step", "spread", "time over the first's", "MFU", "HFU", "padding",
            "waiting for data", "compiling, s", "recompiles", "memory"]  # fmt: skip
    ledger = row.get("ledger") or {}
    totals = {name: ledger.get(name, 0) for name in ("useful", "padding", "recompute")}
    shares = ", ".join(
        f"{name} {percent(n / sum(totals.values()))}" for name, n in totals.items() if any(totals.values())
    )
    words = "Each line adds one change to the line above. Grey lines are other ways to train the same model."
    chart = image(LANE * len(ways) + 0.8, partial(ladder, row, machine), "tokens per second of each way to train")
    return joined([
        tag("h3", f"Training {subject(row)}: {label(row, 'case', 'dtype')}"), tag("p", words, class_="soft"), chart,
        _failures({f"{name}: {why}": [""] for name, why in (row.get("failed") or {}).items()}, 1), table(head, numbers),
        tag("p", f"Operations of a step: {shares}.") if shares else "",
        table(["part", "FLOP"], [[part, si(n, "FLOP")] for part, n in ledger.items()], "Ledger") if shares else "",
    ])  # fmt: skip


def _scaling(rows: list[Row]) -> Html:
    """Return charts of rows whose cases differ in only one size, if there are at least three."""
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
            charts.append(_against(size, members, "median", "seconds"))
            if members[max(members)].get("what") == "decode":
                charts.append(_against(size, members, "bandwidth_share", "share of the bandwidth"))
    return joined([tag("h3", "With size"), *charts]) if charts else Html("")


def _against(size: str, members: dict[int, Row], field: str, name: str) -> Html:
    """Return a chart of one field against a size, with a line for each implementation."""
    row = members[max(members)]
    ends = ("median", "low", "high") if field == "median" else (field,) * 3
    ways = [way for way, times in row["variants"].items() if way != CONTROL and times.get(field)]
    series = {way: [(n, *(times[end] for end in ends)) for n, row in members.items()
                    if (times := row["variants"].get(way)) and times.get(field)] for way in ways}  # fmt: skip
    draw = partial(lines, series, x=size, y=name, ticks={n: f"{n:g}" for n in members})
    title = f"{subject(row)}: {label(row)}"
    return joined([tag("h4", title), image(2.6, draw, f"{title}: {name} against {size}")])


def _history(results: list[Result]) -> Html:
    """Return for each op and model the times of rows that several files have, relative to the first file."""
    by_subject: dict[str, dict[tuple[Any, ...], dict[int, Run]]] = {}
    for i, result in enumerate(results):
        for row in result.rows:
            if ours := _ours(row):
                by_subject.setdefault(subject(row), {}).setdefault(key(row), {})[i] = row, ours
    charts, numbers = [], []
    for name, rows in by_subject.items():
        repeated = [runs for runs in rows.values() if len(runs) > 1]
        changes: dict[str, list[str]] = {"faster": [], "slower": []}
        kinds = []
        for runs in repeated:
            factor, unit = _unit([row for row, _ in runs.values()])
            title, of_row = label(runs[max(runs)][0]), ["even"]
            for before, now in pairwise([-1, *runs]):
                ours, result = runs[now][1], results[now]
                kind, words = _change(runs[before], runs[now]) if before in runs else ("even", "")
                numbers.append([name, title, result.date, result.commit, f"{digits(ours['median'] * factor)} {unit}",
                                _range(ours, factor), (words, kind)])  # fmt: skip
                of_row.append(kind)
                if kind != "even":
                    changes[kind].append(f"{title}: {words} at {result.commit}")
            kinds.append(next(kind for kind in ("slower", "faster", "even") if kind in of_row))
        if repeated:
            charts.append(_trend(name, results, repeated, kinds, changes))
    if not charts:
        return Html("")
    words = """Times relative to the first commit, one line per row. Colours mark changes by more than the noise of
    either run, with spreads that do not overlap."""
    return joined([
        tag("h3", "Over commits"), tag("p", words, class_="soft"), *charts,
        table(["", "case", "date", "commit", "median", "spread", "change"], numbers),
    ])  # fmt: skip


def _trend(name: str, results: list[Result], repeated: list[dict[int, Run]], kinds: list[str],
           changes: dict[str, list[str]]) -> Html:  # fmt: skip
    """Return the chart of an op's rows over commits, and the list of rows that became slower."""
    series = {}
    for runs in repeated:
        first = runs[min(runs)][1]["median"]
        points = [(i, *(ours[end] / first for end in ("median", "low", "high"))) for i, (_, ours) in runs.items()]
        series[label(runs[max(runs)][0])] = points
    ticks = {i: results[i].commit[:7] for i in sorted({i for runs in repeated for i in runs})}
    chart = image(2, partial(lines, series, x="commit", y="time, relative", ticks=ticks, kinds=kinds, log=False), name)
    counts = [tag("span", f"{MARKS[kind]} {len(rows)} {kind} ", class_=kind) for kind, rows in changes.items() if rows]
    slower = tag("ul", *(tag("li", words) for words in changes["slower"]), class_="soft") if changes["slower"] else ""
    return joined([tag("h4", name), *(counts or ["no change beyond the noise"]), chart, slower])


def _change(before: Run, now: Run) -> tuple[str, str]:
    """Return the verdict on a change and its text. It is even within either run's noise or if spreads overlap."""
    (earlier, theirs), (row, ours) = before, now
    apart = theirs["low"] > ours["high"] or theirs["high"] < ours["low"]
    noise = max(earlier.get("noise") or 0, row.get("noise") or 0)
    kind = verdict(theirs["median"] / ours["median"], noise) if apart else "even"
    share = f"{100 * (ours['median'] / theirs['median'] - 1):+.1f} % time".replace("-", "−")
    return kind, f"{MARKS[kind]} {share}, {'within noise' if kind == 'even' else kind}"


def _ours(row: Row) -> dict[str, Any] | None:
    """Return the times of mm1, or of the ladder's fastest rung."""
    ladder = [way for way in row["variants"].values() if way.get("change")]
    return row["variants"].get("mm1") or min(ladder, key=lambda way: way["median"], default=None)


def _comparison(ratio: float, kind: str) -> str:
    times = f"{digits(ratio)}×"
    words = {"faster": f"{times} faster", "slower": f"slower: {times}", "even": f"{times}, within noise"}.get(kind)
    return f"{MARKS[kind]} {words}" if words else times


def _unit(rows: list[Row]) -> tuple[float, str]:
    """Return a table's unit of time, and the factor that converts seconds to it."""
    least = min((times["median"] for row in rows for times in row["variants"].values()), default=1)
    return (1e6, "µs") if least < 1e-3 else (1e3, "ms")


def _range(times: dict[str, Any] | None, factor: float = 1) -> str:
    return f"{digits(times['low'] * factor)} … {digits(times['high'] * factor)}" if times else ""
