"""Write the tables of measurements in README.md and docs/benchmarks.md from the records: python -m mm1.bench.readme.

Each table is between two comments, `<!-- table: BENCH MACHINE SUBJECT [PATTERN] -->` and `<!-- end -->`. It shows the
newest record of that machine that has rows of that op or model. PATTERN is a regular expression that selects rows by
case and direction. The table `summary all all` has one line for each op and model, from the newest record of any
machine.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mm1.bench.comparison import DENSE, OWN, Result, fastest, gather, label, newest, peers, subject, verdict
from mm1.bench.page import digits, percent
from mm1.bench.record import RESULTS, Row
from mm1.bench.timing import CONTROL
from mm1.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) (\S+)(?: (?!-->)([^\n]+?))? -->\n)(.*?)(<!-- end -->)", re.S)
NAMES = {"forward": "forward", "forward+backward": "forward + backward", "step": "training step"}

Lines = tuple[list[str], list[list[str]], list[str]]  # head, rows of cells, sentences below the table


def rewrite(pages: Sequence[Path] = PAGES, records: Sequence[Path] = (RESULTS,)) -> None:
    """Rewrite the tables of the pages. Raises UserError for a table without a record."""
    for page in pages:
        page.write_text(current(page, records))


def current(page: Path, records: Sequence[Path] = (RESULTS,)) -> str:
    """Return the text of a page with current tables. Raises UserError for a table without a record.

    records: files and folders (default: the project's).
    """
    text = page.read_text()
    return tables(text, gather(records)) if "<!-- table:" in text else text


def tables(page: str, results: Sequence[Result]) -> str:
    """Return the text with each table made from the results, which are in order, oldest first.

    Raises UserError for a malformed comment, and for a table without a record.
    """
    markers = list(TABLE.finditer(page))
    if page.count("<!-- table:") != len(markers) or any("<!-- table:" in match[6] for match in markers):
        raise UserError("a table of the page is not <!-- table: BENCH MACHINE SUBJECT --> … <!-- end -->")
    return TABLE.sub(lambda match: match[1] + _table(results, *match.group(2, 3, 4, 5)) + match[7], page)


def _table(results: Sequence[Result], bench: str, machine: str, name: str, pattern: str | None) -> str:
    if bench == "summary":
        return _markdown(*_summary(results))
    results = [result for result in results if result.machine == machine]
    if bench == "static":
        return _static(results, name)
    result, rows = newest(results, bench).get(name, (None, []))
    rows = [row for row in rows if row["variants"] and re.search(pattern or "", label(row))]
    if result is None or not rows:
        raise UserError(f"no record has rows of {bench} {machine} {' '.join(filter(None, (name, pattern)))}")
    head, lines, notes = (_ladder if bench == "train" else _compared)(rows)
    counts = sorted({times["n"] for row in rows for times in row["variants"].values() if "n" in times})
    about = f"{result.header.get('device')}, {'/'.join(dict.fromkeys(str(row.get('dtype')) for row in rows))}"
    rounds = (
        f"medians of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} rounds in turns" if counts else ""
    )
    path = result.path.relative_to(ROOT) if result.path.is_relative_to(ROOT) else result.path
    failed = dict.fromkeys(f"{way}: {why}" for row in rows for way, why in (row.get("failed") or {}).items())
    words = [f"{about}, {rounds}, {result.date}, commit {result.commit} (`{path.as_posix()}`).", *notes]
    words += [f"Not measured: {'; '.join(failed)}."] if failed else []
    return _markdown(head, lines, words)


def _markdown(head: list[str], lines: list[list[str]], words: list[str]) -> str:
    body = [_line(head), _line(["---"] * len(head)), *map(_line, lines)]
    text = textwrap.fill(" ".join(words), 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join(["", *body, "", text, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _compared(rows: list[Row]) -> Lines:
    """Return the milliseconds of mm1 and of the other implementations, and the fastest peer's time over mm1's."""
    ways = dict.fromkeys(["mm1", *(way for row in rows for way in peers(row))])
    ways |= dict.fromkeys(way for row in rows for way in row["variants"] if way not in (*ways, CONTROL))
    rates = {"tokens_per_s": ("tokens/s", digits), "bandwidth_share": ("of the bandwidth", percent)}
    rates = {field: how for field, how in rates.items() if any(field in row["variants"].get("mm1", {}) for row in rows)}
    lines, slower = [], 0
    for row in rows:
        best, variants = fastest(row), row["variants"]
        kind = verdict(best[1], row.get("noise")) if best else ""
        times = f"{digits(best[1])}×" if best else ""
        slower += kind == "slower"
        texts = {"faster": f"{times} faster", "slower": f"**slower: {times}**", "even": f"{times}, within noise"}
        lines.append([
            str(row.get("case")), label({**row, "gpu": None}, "what"), texts.get(kind, ""),
            *(digits(1e3 * variants[way]["median"]) if way in variants else "" for way in ways),
            *(how(variants.get("mm1", {}).get(field)) for field, (_, how) in rates.items()),
        ])  # fmt: skip
    notes = ["Milliseconds; `mm1 is` is the fastest peer's time over mm1's."]
    notes += ["dense: matrix products of as many operations, a yardstick."] if DENSE in ways else []
    notes += [f"**mm1 is slower than the fastest peer in {slower} of {len(rows)} rows.**"] if slower else []
    hot = sum(bool((row.get("gpu") or {}).get("throttled")) for row in rows)
    notes += [f"The GPU throttled in {hot} of {len(rows)} rows."] if hot else []
    return ["", "", "mm1 is", *ways, *(name for name, _ in rates.values())], lines, notes


def _ladder(rows: list[Row]) -> Lines:
    """Return the rungs of the training ladder, and other ways to train the same model."""
    lines = [[
        name, times.get("change") or times.get("about") or "another way", digits(1e3 * times["median"]),
        digits(times.get("tokens_per_s")), percent(times.get("mfu")), percent(times.get("hfu")),
    ] for row in rows for name, times in row["variants"].items() if name != CONTROL]  # fmt: skip
    return ["", "adds", "ms a step", "tokens/s", "MFU", "HFU"], lines, [f"A step: {row.get('case')}." for row in rows]


def _static(results: Sequence[Result], name: str) -> str:
    """Return a line for each kernel of an op, or for "all" of all ops: what `mm1 bench static` read in machine code."""
    results = [result for result in results if any(name in ("all", subject(row)) for row in result.rows)]
    if not results:
        raise UserError(f"no record has rows of static {name}")
    result = results[-1]
    rows = [row for row in result.rows if name in ("all", subject(row))]
    count = lambda row, field: f"{row[field]:.0f}" if row[field] else ""  # noqa: E731
    scaled = lambda row, field, by: digits(by * row[field]) if field in row else ""  # noqa: E731
    lines = [[
        f"{row['op']}, {row['case']}", f"{row['mode']} `{row['what']}`", digits(row.get("instructions")),
        count(row, "issue"), count(row, "tensor"), percent(row.get("share")), percent(row.get("in_loop")),
        count(row, "barriers"), str(row["registers"]), f"{row['shared'] / 1024:.0f}", str(row["programs"]),
        count(row, "spills"), scaled(row, "seconds", 1e6), scaled(row, "bytes", 1e-6),
    ] for row in rows if "registers" in row]  # fmt: skip
    failed = [f"{peer}: {why}" for row in rows for peer, why in (row.get("failed") or {}).items()]
    head = ["", "", "instructions a MFLOP", "issue", "tensor", "tensor share", "in loop", "barriers", "registers",
            "KiB", "programs", "spills", "µs", "MB"]  # fmt: skip
    gpu, versions = result.machine.removeprefix("static-"), result.header["versions"]
    words = [
        f"Compiled for {gpu} by Triton {versions.get('triton')} and not run, {result.date}, commit {result.commit}."
    ]
    return _markdown(head, lines, words + [f"Not compiled: {'; '.join(failed)}."] * bool(failed))


def _summary(results: Sequence[Result]) -> Lines:
    """Return a line for each op, each trained model and each part of generation that was compared with a peer."""
    lines, devices = [], {}
    for bench in ("kernels", "train", "generate"):
        for name, (result, rows) in newest(results, bench).items():
            groups: dict[str, list[tuple[float, str]]] = {}
            for row in rows:
                if best := _trained(row) if bench == "train" else fastest(row):
                    title = f"`{name}`" if bench == "kernels" else f"{NAMES.get(row['what'], row['what'])}, {name}"
                    groups.setdefault(title, []).append((best[1], verdict(best[1], row.get("noise"))))
            for title, ratios in groups.items():
                low, high = min(ratios)[0], max(ratios)[0]
                kinds = [kind for _, kind in ratios]
                device = devices.setdefault(str(result.header.get("device")), chr(ord("A") + len(devices)))
                lines.append([
                    title, f"{digits(low)}×" if low == high else f"{digits(low)}× … {digits(high)}×",
                    *(str(kinds.count(kind)) if kind in kinds else "" for kind in ("faster", "even", "slower")), device,
                ])  # fmt: skip
    notes = ["The first column of numbers is the range, over all cases, of the fastest peer's time divided by mm1's:",
             "above 1 mm1 is faster. The next three count cases; `within noise`: two runs of mm1 differ by at least as",
             "much.",
             "Machines: " + "; ".join(f"{letter} is {name}" for name, letter in devices.items()) + "."]  # fmt: skip
    return ["", "peer's time / mm1's", "faster", "within noise", "slower", "machine"], lines, notes


def _trained(row: Row) -> tuple[str, float] | None:
    """Return the fastest other way to train a ladder's model, and its time over the fastest rung's."""
    ways = {name: times for name, times in row["variants"].items() if name != CONTROL and not name.startswith(OWN)}
    rungs = [times["median"] for times in ways.values() if times.get("change")]
    others = {name: times["median"] for name, times in ways.items() if not times.get("change")}
    if not rungs or not others:
        return None
    name = min(others, key=others.__getitem__)
    return name, others[name] / min(rungs)


if __name__ == "__main__":
    rewrite()
