"""README's tables of measurements, from the records: python -m mm1.bench.readme writes them anew.

<!-- table: BENCH MACHINE SUBJECT [PATTERN] --> and <!-- end --> hold a table: of the newest record of that machine with
rows of that op or model; with a pattern, a regular expression, of the rows whose case or direction holds it.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mm1.bench.chart import digits, percent
from mm1.bench.comparison import DENSE, Result, fastest, gather, label, newest, peers, verdict
from mm1.bench.record import RESULTS, Row
from mm1.bench.timing import CONTROL
from mm1.errors import UserError

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) (\S+)(?: (?!-->)([^\n]+?))? -->\n)(.*?)(<!-- end -->)", re.S)


def rewrite(readme: Path = ROOT / "README.md") -> None:
    """Raises UserError for a table that no record gives."""
    readme.write_text(current(readme))


def current(readme: Path = ROOT / "README.md") -> str:
    """What the README is to say, by the records of this package."""
    text = readme.read_text()
    return tables(text, gather([RESULTS])) if "<!-- table:" in text else text


def tables(readme: str, results: Sequence[Result]) -> str:
    """With each table as the results, oldest first, give it. Raises UserError."""
    found = list(TABLE.finditer(readme))
    if readme.count("<!-- table:") != len(found) or any("<!-- table:" in match[6] for match in found):
        raise UserError("a table of the README is not <!-- table: BENCH MACHINE SUBJECT --> … <!-- end -->")
    return TABLE.sub(lambda match: match[1] + _table(results, *match.group(2, 3, 4, 5)) + match[7], readme)


def _table(results: Sequence[Result], bench: str, machine: str, name: str, pattern: str | None) -> str:
    of = newest([result for result in results if result.machine == machine], bench)
    result, rows = of.get(name, (None, []))
    rows = [row for row in rows if row["variants"] and re.search(pattern or "", label(row))]
    if result is None or not rows:
        raise UserError(f"no record has rows of {bench} {machine} {' '.join(filter(None, (name, pattern)))}")
    head, lines, notes = (_ladder if bench == "train" else _compared)(rows)
    counts = sorted({found["n"] for row in rows for found in row["variants"].values() if "n" in found})
    about = f"{result.header.get('device')}, {'/'.join(dict.fromkeys(str(row.get('dtype')) for row in rows))}"
    rounds = (
        f"medians of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} rounds in turns" if counts else ""
    )
    link = f"[record]({Path(os.path.relpath(result.path, ROOT)).as_posix()})"
    failed = dict.fromkeys(f"{way}: {why}" for row in rows for way, why in (row.get("failed") or {}).items())
    words = [f"{about}, {rounds}, {result.date}, commit {result.commit} ({link}).", *notes]
    words += [f"Not measured: {'; '.join(failed)}."] if failed else []
    body = [_line(head), _line(["---"] * len(head)), *map(_line, lines)]
    text = textwrap.fill(" ".join(words), 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join(["", *body, "", text, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _compared(rows: list[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Milliseconds of mm1 and of the others, and the ratio to the fastest."""
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
        says = {"faster": f"{times} faster", "slower": f"**slower: {times}**", "even": f"{times}, within noise", "": ""}
        lines.append([
            str(row.get("case")), label({**row, "gpu": None}, "what"),
            *(digits(1e3 * variants[way]["median"]) if way in variants else "" for way in ways),
            *(how(variants.get("mm1", {}).get(field)) for field, (_, how) in rates.items()), says[kind],
        ])  # fmt: skip
    notes = ["Milliseconds; last, the fastest peer's time over mm1's."]
    notes += ["dense: products of as many operations, a yardstick."] if DENSE in ways else []
    notes += [f"**mm1 is slower than the fastest peer in {slower} of {len(rows)} rows.**"] if slower else []
    hot = sum(bool((row.get("gpu") or {}).get("throttled")) for row in rows)
    notes += [f"The GPU throttled in {hot} of {len(rows)} rows."] if hot else []
    return ["", "", *ways, *(name for name, _ in rates.values()), "mm1 is"], lines, notes


def _ladder(rows: list[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Of training: the rungs, and other ways."""
    lines = [[
        name, found.get("change") or found.get("about") or "another way", digits(1e3 * found["median"]),
        digits(found.get("tokens_per_s")), percent(found.get("mfu")), percent(found.get("hfu")),
    ] for row in rows for name, found in row["variants"].items() if name != CONTROL]  # fmt: skip
    return ["", "adds", "ms a step", "tokens/s", "MFU", "HFU"], lines, [f"A step: {row.get('case')}." for row in rows]


if __name__ == "__main__":
    rewrite()
